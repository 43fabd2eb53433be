"""Every setting of a run."""

from fastflag.config.fields import Calendar, Convention, Device, Optimizer, Position, flag
from fastflag.config.presets import PRESETS
from fastflag.config.reading import (
    base_of,
    checked,
    from_dict,
    from_run,
    to_dict,
    with_settings,
)
from fastflag.config.settings import (
    AlgorithmConfig,
    DataConfig,
    PlanConfig,
    PolicyConfig,
    PortfolioConfig,
    PromptConfig,
    RebalancingConfig,
    RolloutConfig,
    SimulatorConfig,
    TrainConfig,
)

__all__ = [
    "PRESETS",
    "AlgorithmConfig",
    "Calendar",
    "Convention",
    "DataConfig",
    "Device",
    "Optimizer",
    "PlanConfig",
    "PolicyConfig",
    "PortfolioConfig",
    "Position",
    "PromptConfig",
    "RebalancingConfig",
    "RolloutConfig",
    "SimulatorConfig",
    "TrainConfig",
    "base_of",
    "checked",
    "flag",
    "from_dict",
    "from_run",
    "to_dict",
    "with_settings",
]
