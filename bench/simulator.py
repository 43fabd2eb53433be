"""The market alone: environment steps a second from a table, one core, no model.

    python -m bench.simulator [--json] [--envs 4096] [--assets 16] [--rounds 20]

Accounts live 63 days of a random market; each action is drawn from a table with a row of its own
for every state that can be reached. Once with the arrays that a rollout returns (a new page of
memory costs more than what is written to it) and once the kernel alone, into arrays that are there
already. Then Gymnasium's environments: many at once beside their twin in plain NumPy, and one.
Times are the thread's on the processor, the least of the rounds: who else is on the machine makes
them no shorter.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numba
import numpy as np
from gymnasium.vector import AutoresetMode

from bench.measure.results import Row, publish
from bench.rivals.simulators import NumPyEnvs
from fastflag.config import PortfolioConfig, SimulatorConfig
from fastflag.gym.env import MarketEnv
from fastflag.gym.single import SingleView
from fastflag.gym.vector import MarketVectorEnv
from fastflag.market.bars import Bars, Market
from fastflag.market.compiled.portfolio_constants import CODES as SLOT_CODES
from fastflag.market.tasks import portfolio, single
from fastflag.market.tasks.account_codes import side_of
from fastflag.market.tasks.portfolio import Portfolio
from fastflag.market.tasks.single import Single
from fastflag.market.tasks.slot_codes import side_of as side_of_slot

_STEPS = 63


def random_market(assets: int, seed: int = 0) -> Market:
    random = np.random.default_rng(seed)
    shape = (_STEPS + 1, assets)
    close = 50 * np.exp(np.cumsum(random.normal(0, 0.02, shape), axis=0))
    opened = close * np.exp(random.normal(0, 0.005, shape))
    dates = np.busday_offset("2001-01-01", np.arange(_STEPS + 1)).astype("datetime64[D]")
    symbols = tuple(f"S{k}" for k in range(assets))
    prices = opened, np.maximum(opened, close), np.minimum(opened, close), close
    return Market(dates, symbols, *prices, np.full(shape, 1e6), np.ones(shape), np.zeros(shape))


def table(task: Any, sides: Callable[..., np.ndarray], codes: int) -> tuple[np.ndarray, np.ndarray]:
    """A random policy over all that can be reached: (cdf, row_of)."""
    reached = task.reachable(range(_STEPS + 1), task.start(1))
    moment, *slot, code = np.nonzero(reached)
    row_of = np.full(reached.shape, -1, np.int32)
    row_of[reached] = np.arange(len(moment))
    mask = task.allowed(moment, sides(code), *slot)
    weights = np.random.default_rng(0).dirichlet(np.ones(len(task.actions)), len(moment)) * mask
    assert reached.shape[-1] == codes
    return np.cumsum(weights / weights.sum(1, keepdims=True), axis=1), row_of


def rows_of(
    name: str, shape: str, task: Any, module: Any, policy: tuple, envs: int, rounds: int
) -> list[Row]:
    moments = np.arange(_STEPS)
    calls: list[tuple] = []
    kernel = module.rollout_nb

    def kept(*arguments: Any) -> Any:
        calls.append(arguments)
        return kernel(*arguments)

    def rollout() -> None:
        task.rollout(task.start(envs), moments, moments == 0, *policy, 0, 0, 0)

    with mock.patch.object(module, "rollout_nb", kept):
        rollout()
    steps = envs * _STEPS
    whole = steps / least(rollout, rounds) / 1e6
    alone = steps / least(lambda: kernel(*calls[0]), rounds) / 1e6
    return [
        Row(name, shape, "fastflag", whole, "M steps/s", note="with the arrays returned"),
        Row(name, shape, "fastflag, kernel", alone, "M steps/s", note="into arrays that are there"),
    ]


def rows_of_gymnasium(envs: int, rounds: int) -> list[Row]:
    """Environments as Gymnasium has them, beside the same in plain NumPy, in turns."""
    market, shape = random_market(1), f"{envs} environments"
    calls = max(4096 // envs, _STEPS)
    actions = np.random.default_rng(0).integers(3, size=(calls, envs))
    view = SingleView.of(market)
    ours: Any = MarketVectorEnv(view, envs, AutoresetMode.SAME_STEP)
    plain = NumPyEnvs(view, envs)
    ours.reset(seed=0), plain.reset()

    def lived(each: Any) -> None:
        for action in actions:
            each.step(action)

    def alone() -> None:
        for action in actions[:, 0]:
            if any(one.step(action)[2:4]):
                one.reset()

    one = MarketEnv(view)
    one.reset(seed=0)
    taken = [(least(lambda: lived(ours), 1), least(lambda: lived(plain), 1)) for _ in range(rounds)]
    fast, slow = (envs * calls / min(times) / 1e6 for times in zip(*taken, strict=True))
    single = calls / least(alone, rounds) / 1e6
    name, against = "single, Gymnasium", "plain NumPy"
    return [
        Row(name, shape, "fastflag, VectorEnv", fast, "M steps/s", fast / slow, against),
        Row(name, shape, against, slow, "M steps/s"),
        Row(name, "1 environment", "fastflag, Env", single, "M steps/s"),
    ]


def least(work: Callable[[], Any], rounds: int) -> float:
    """Seconds of this thread on the processor."""
    taken = []
    for _ in range(rounds):
        began = time.thread_time()
        work()
        taken.append(time.thread_time() - began)
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--envs", type=int, nargs="+", default=[4096])
    parser.add_argument("--assets", type=int, nargs="+", default=[16])
    parser.add_argument("--rounds", type=int, default=20)
    chosen = parser.parse_args()
    numba.config.NUMBA_NUM_THREADS = 1
    rows = []
    for envs in chosen.envs:
        rows += rows_of_gymnasium(envs, chosen.rounds)
        for positions in ("long_flat", "long_short"):
            bars = Bars.from_market(random_market(1), "S0")
            task = Single.of(SimulatorConfig(positions=positions), bars)
            policy = table(task, side_of, task.codes)
            shape = f"{envs} environments"
            rows += rows_of(
                f"single, {positions}", shape, task, single, policy, envs, chosen.rounds
            )
        for assets in chosen.assets:
            for rules in (
                PortfolioConfig(reward="sharpe"),
                PortfolioConfig(fee_bps=0, slippage_bps=0),
            ):
                task = Portfolio.of(rules, random_market(assets))
                policy = table(task, side_of_slot, SLOT_CODES)
                name = "portfolio, Sharpe" if rules.fee_bps else "portfolio, log, no costs"
                shape = f"{envs} environments x {assets} assets"
                rows += rows_of(name, shape, task, portfolio, policy, envs, chosen.rounds)
    publish("simulator", rows, chosen.json)


if __name__ == "__main__":
    main()
