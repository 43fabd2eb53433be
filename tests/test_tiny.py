"""FastFLAG in one page: a model and a market that are tiny, from bars to a decision.

Read it as the manual of the Python side; what is asserted is what can be known without the program.
"""

import math

import numpy as np
import pytest

import fastflag as ff

pytestmark = pytest.mark.usefixtures("one_thread")


def test_from_bars_to_a_decision(tiny_model, tmp_path):
    # A market is bars and news. This one is made up: each day's news tells where the next one goes.
    # Yours would be "csv:bars.csv", with news beside it in bars.news.csv.
    data = "planted:days=40,seed=3"
    market = ff.load(data)
    first, last = market.dates[[24, 39]]
    opened, close = market.open[24:, 0], market.close[24:, 0]

    # What there is to beat: buying and holding, here free of costs.
    held = ff.metrics(market, str(first), str(last))
    assert held.values["cr"] == pytest.approx(100 * (close[-1] / close[0] - 1))

    # A training is a folder. Settings are the flags of `fastflag train`, by name: 4 accounts live 4
    # updates of 6 days each, and the top one of the model's 2 layers learns.
    sizes = {"num_envs": 4, "num_steps": 6, "total_timesteps": 4 * 4 * 6, "top_layers": 1}
    run = ff.train(
        tmp_path / "run",
        data=data,
        train=f"{market.dates[0]}..{market.dates[23]}",
        test=f"{first}..{last}",
        model=str(tiny_model),
        learning_rate=0.02,
        backtest_episodes=3,
        **sizes,
    )

    # A row an update. Untrained, the policy takes either of the two actions that an account may
    # take (Hold and Buy, or Hold and Sell) as often; the learning rate falls to 0.
    assert run.metrics["entropy"][0] == pytest.approx(math.log(2))
    assert run.metrics["learning_rate"].tolist() == pytest.approx([0.02, 0.015, 0.01, 0.005])

    # The held-out days, beside buy-and-hold: an order of the first day's close is filled at the
    # next open, 2 basis points above it, for a fee of 1 basis point of what it costs.
    days = run.backtest().to_frame()
    shares = 100_000 / (opened[1] * 1.0002 * 1.0001)
    assert days["buy_and_hold"].tolist() == pytest.approx([100_000, *(shares * close[1:])])
    assert days["equity"].iloc[0] == 100_000

    # Whoever holds nothing can't sell; whoever has bought can't buy. What can be done adds up to 1.
    flat = run.decide(str(last))
    long = run.decide(str(last), position="long", entry=close[-2], since=str(market.dates[38]))
    assert flat.probabilities["Sell"] == 0 and long.probabilities["Buy"] == 0
    assert sum(flat.probabilities.values()) == pytest.approx(1)
    assert flat.action == max(flat.probabilities, key=flat.probabilities.get)

    # A run is its folder: opened again, perhaps tomorrow, it decides the same.
    assert ff.open(tmp_path / "run").decide(str(last)) == flat
    assert np.isfinite(flat.value)

    # And report.html tells it all; a notebook shows it where `run` is a cell's last line.
    assert (tmp_path / "run" / "report.html").exists()
