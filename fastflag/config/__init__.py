"""Every setting of a run."""

from fastflag.config.fields import Optimizer, flag
from fastflag.config.presets import PRESETS
from fastflag.config.reading import from_dict, from_run, to_dict
from fastflag.config.settings import (
    AlgorithmConfig,
    DataConfig,
    PlanConfig,
    PolicyConfig,
    PromptConfig,
    RolloutConfig,
    SimulatorConfig,
    TrainConfig,
)

__all__ = [
    "PRESETS",
    "AlgorithmConfig",
    "DataConfig",
    "Optimizer",
    "PlanConfig",
    "PolicyConfig",
    "PromptConfig",
    "RolloutConfig",
    "SimulatorConfig",
    "TrainConfig",
    "flag",
    "from_dict",
    "from_run",
    "to_dict",
]
