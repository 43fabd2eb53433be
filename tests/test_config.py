import dataclasses
import json
import math
import os
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from fastflag.config import (
    PRESETS,
    AlgorithmConfig,
    DataConfig,
    RolloutConfig,
    SimulatorConfig,
    TrainConfig,
    from_dict,
    from_run,
    to_dict,
)
from fastflag.config.fields import Range
from fastflag.files import InputError


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, the dataclass it is a field of, value) of every setting."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", config, value


NUMBERS = [
    name for name, _, value in leaves(TrainConfig()) if type(value) in (int, float)
]  # type(True) is bool


def nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("preset", PRESETS)
def test_json_and_back(preset):
    config = PRESETS[preset]
    assert from_dict(json.loads(json.dumps(to_dict(config))), "here") == config


@pytest.mark.parametrize("dividends", ["reinvest", "cash"])
def test_a_run_from_before_there_was_a_choice_paid_dividends_in_cash(dividends):
    config = dataclasses.replace(PRESETS["demo"], simulator=SimulatorConfig(dividends=dividends))
    document = to_dict(config) | {"fastflag": "0.1.0"}
    assert from_run(document, "here") == config
    del document["simulator"]["dividends"]
    before = dataclasses.replace(config, simulator=SimulatorConfig(dividends="cash"))
    assert from_run(document, "here") == before
    assert document["fastflag"] == "0.1.0"
    # What a user leaves out of settings of their own is as it is now.
    assert from_dict({"simulator": {}}, "here").simulator.dividends == "reinvest"


def test_values_go_over_the_base_and_the_rest_stays():
    base = PRESETS["paper"]
    config = from_dict({"rollout": {"num_envs": 8}, "seed": 3}, "here", base)
    assert (config.rollout.num_envs, config.seed) == (8, 3)
    assert config.rollout.num_steps == base.rollout.num_steps == 40
    assert dataclasses.replace(config, rollout=base.rollout, seed=base.seed) == base
    assert type(from_dict({"algorithm": {"gamma": 1}}, "here").algorithm.gamma) is float


def test_a_flag_has_one_meaning():
    """The command line leaves the prefixes out, so no two settings may share a name."""
    names = [name.rpartition(".")[2] for name, _, _ in leaves(TrainConfig())]
    assert len(names) == len(set(names))
    assert not set(names) & {"out", "preset", "config", "resume", "json", "help"}


def test_every_setting_is_of_a_type_that_is_checked():
    for name, owner, value in leaves(TrainConfig()):
        hint = typing.get_type_hints(type(owner))[name.rpartition(".")[2]]
        assert hint in (int, float, bool, str) or typing.get_origin(hint) is typing.Literal, name
        assert hint not in (int, float) or type(value) is hint, name


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_a_range(name):
    """None is NaN or infinite, and each has an end below which it is refused."""
    kind = next(type(value) for other, _, value in leaves(TrainConfig()) if other == name)
    wrong = [-1, -(10**30)] if kind is int else [-1.0, -1e30, math.nan, math.inf, -math.inf]
    for value in wrong:
        flag = f"--{name.rpartition('.')[2].replace('_', '-')}"
        with pytest.raises(InputError) as caught:
            from_dict(nested(name, value), "there")
        assert str(caught.value).endswith(f", not {value}, {flag} in there")


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("prompt.window", (1, 1000), (0, 1001)),
        ("prompt.news_tokens", (0, 10_000), (-1, 10_001)),
        ("simulator.fee_bps", (0, 9_999.9), (-0.1, 10_000)),
        ("simulator.slippage_bps", (0, 9_999.9), (-0.1, 10_000)),
        ("simulator.lot", (0, 100), (-1,)),
        ("simulator.cash", (0.01, 1e12), (0, -5)),
        ("simulator.ruin", (1e-9, 0.99), (0, 1)),
        ("simulator.horizon", (1,), (0,)),
        ("policy.top_layers", (0, 1), (-1,)),
        ("policy.lora_rank", (1,), (0,)),
        ("policy.lora_alpha", (0.1,), (0,)),
        ("policy.trunk_cache_mb", (0,), (-1,)),
        ("rollout.num_envs", (1,), (0,)),
        ("rollout.num_steps", (1,), (0,)),
        ("rollout.start_groups", (1,), (0,)),
        ("algorithm.learning_rate", (0, 1), (-1e-9,)),
        ("algorithm.gamma", (0, 1), (-0.01, 1.01)),
        ("algorithm.gae_lambda", (0, 1), (-0.01, 1.01)),
        ("algorithm.update_epochs", (1,), (0,)),
        ("algorithm.minibatch_size", (0,), (-1,)),
        ("algorithm.clip_coef", (0.1, 1e9), (0, 1.1e9)),
        ("algorithm.target_kl", (0,), (-0.1,)),
        ("total_timesteps", (1,), (0,)),
        ("seed", (0, 2**63 - 1), (-1, 2**63)),
        ("checkpoint_every", (1,), (0,)),
        ("backtest_episodes", (1,), (0,)),
    ],
)
def test_ends_of_ranges(name, inside, outside):
    for value in inside:
        from_dict(nested(name, value), "there")
    for value in outside:
        with pytest.raises(InputError, match="must be"):
            from_dict(nested(name, value), "there")


def test_ranges_hold_however_a_config_is_made():
    with pytest.raises(InputError, match=r"fee_bps must be at least 0 and below 10,000, not -1"):
        SimulatorConfig(fee_bps=-1)
    with pytest.raises(InputError, match="gamma must be at least 0 and at most 1, not nan"):
        dataclasses.replace(AlgorithmConfig(), gamma=math.nan)
    assert str(Range(above=0)) == "above 0"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"seeds": 1}, "unknown config key 'seeds', there"),
        ({"rollout": {"envs": 1}}, "unknown config key 'rollout.envs', there"),
        ({"num_envs": 1}, "unknown config key 'num_envs', there"),
        ([], "config must be a JSON object, there"),
        (None, "config must be a JSON object, there"),
        ({"rollout": 3}, "rollout must be a JSON object, there"),
        ({"rollout": None}, "rollout must be a JSON object, there"),
        ({"seed": 1.0}, "config key 'seed' must be a whole number, not 1.0, there"),
        ({"seed": True}, "'seed' must be a whole number, not True"),
        ({"seed": "1"}, "'seed' must be a whole number, not '1'"),
        ({"seed": None}, "'seed' must be a whole number, not None"),
        ({"algorithm": {"gamma": "0.9"}}, "'algorithm.gamma' must be a number, not '0.9'"),
        ({"algorithm": {"gamma": False}}, "'algorithm.gamma' must be a number, not False"),
        ({"simulator": {"cash": 10**400}}, "'simulator.cash' must be a number"),
        ({"algorithm": {"norm_adv": 1}}, "'algorithm.norm_adv' must be true or false, not 1"),
        ({"data": {"symbol": 5}}, "'data.symbol' must be text, not 5"),
        ({"data": {"data": "csv:\ud83d"}}, r"'data.data' must be text, not 'csv:\ud83d'"),
        ({"policy": {"model": "a\0b"}}, r"'policy.model' must be text, not 'a\x00b'"),
        ({"prompt": {"layout": "ours"}}, "'prompt.layout' must be one of default, paper"),
        ({"prompt": {"layout": ["paper"]}}, "'prompt.layout' must be one of default, paper"),
        ({"prompt": {"layout": {}}}, "'prompt.layout' must be one of default, paper"),
    ],
)
def test_refused(values, told):
    with pytest.raises(InputError) as caught:
        from_dict(values, "there")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_not_utf_8_is_a_name():
    name = os.fsdecode(b"csv:\xff.csv")
    assert from_dict({"data": {"data": name}}, "there").data.data == name


def test_what_else_a_runs_file_says_is_no_setting():
    document = to_dict(PRESETS["paper"]) | {"fastflag": "0.1.0", "market": "ab"}
    assert from_run(document, "there") == PRESETS["paper"]
    with pytest.raises(InputError, match="unknown config key 'market'"):
        from_dict({"market": "ab"}, "there")


def test_steps():
    rollout = RolloutConfig(num_envs=3, num_steps=5)
    assert TrainConfig(rollout=rollout, total_timesteps=44).updates == 2
    assert TrainConfig(rollout=rollout, total_timesteps=14).updates == 0
    assert PRESETS["paper"].updates == 346


def test_the_paper_preset_is_the_papers_table_3():
    paper = PRESETS["paper"]
    algorithm, rollout, simulator = paper.algorithm, paper.rollout, paper.simulator
    assert paper.total_timesteps == 13_860 and paper.updates == 346
    assert algorithm.algorithm == "ppo"
    assert algorithm.learning_rate == algorithm.layer_learning_rate == 5e-4
    assert (rollout.num_envs, rollout.num_steps, rollout.start_groups) == (1, 40, 1)
    assert algorithm.anneal_lr and algorithm.norm_adv and algorithm.clip_vloss
    assert (algorithm.gamma, algorithm.gae_lambda) == (0.95, 0.98)
    assert algorithm.update_epochs == 1
    assert (algorithm.clip_coef, algorithm.ent_coef, algorithm.vf_coef) == (0.2, 0.05, 0.5)
    assert algorithm.kl_coef == 0.05
    assert algorithm.max_grad_norm == 0.5
    assert algorithm.target_kl == 0.0
    assert algorithm.minibatch_size == 32
    assert simulator.horizon == 65
    # And from its equations and its prompt:
    assert (simulator.fill, simulator.positions, simulator.reward) == (
        "next_close",
        "long_flat",
        "sharpe",
    )
    assert (simulator.fee_bps, simulator.slippage_bps, simulator.lot) == (0.0, 0.0, 0.0)
    assert (paper.prompt.layout, paper.prompt.account) == ("paper", "exact")
    assert not paper.prompt.anonymise
    # Its layers are trained in full, its heads MLPs.
    policy = paper.policy
    assert (policy.adaptation, policy.trunk_weights, policy.head) == ("full", "bf16", "mlp")
    assert paper.data.train == "2020-07-01..2020-09-30"
    assert paper.data.test == "2020-10-01..2021-05-06"


def test_configs_can_not_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataConfig().data = "csv:other"
