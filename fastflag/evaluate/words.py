"""What a run's numbers allow one to say, in words."""

import math
from datetime import date
from typing import Any, TypeGuard

import numpy as np

from fastflag.config import TrainConfig

# A policy that spends this share of its days in one position is named after that position.
_CONSTANT = 0.97


def finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int | None = 2) -> str:
    """With `digits` decimals (None: as many as it has) and a true minus sign; a dash for none."""
    if not finite(value):
        return "–"
    text = f"{value:,g}" if digits is None else f"{value:,.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def percent(value: float | None, digits: int = 2) -> str:
    return number(value, digits) + "%" * finite(value)


def verdict(backtest: dict[str, Any]) -> tuple[str, list[str]]:
    """A title, and paragraphs that say no more than the numbers do."""
    if "groups" in backtest:
        return _verdict_of_several(backtest)
    policies, sampled, chance = (backtest[key] for key in ("policies", "sampled", "random"))
    greedy, hold = (policies[key]["metrics"]["standard"] for key in ("greedy", "buy_and_hold"))
    percentile, reach = chance["percentile"]["greedy"], chance["sharpe"]
    told = [
        f"The greedy policy returned {percent(greedy['cr'], 1)} at a Sharpe ratio of "
        f"{number(greedy['sr'])}; buy-and-hold {percent(hold['cr'], 1)} at {number(hold['sr'])}."
    ]
    if spread := sampled["metrics"]["standard"]["sr"]:
        told.append(
            f"With actions sampled, the mean Sharpe ratio of {sampled['episodes']:,} episodes is "
            f"{number(spread['mean'])}."
        )
    several = "assets" in backtest
    constant, exposure = ("", _invested(backtest)) if several else _exposure(backtest)
    told += [
        f"Of {chance['episodes']:,} random policies under the same rules, the greedy one is ahead "
        f"of {percent(percentile, 1)}; their middle 90% reach from {number(reach['p05'])} to "
        f"{number(reach['p95'])}.",
        exposure,
    ]
    title = constant or _comparison(greedy["sr"], hold["sr"], percentile)
    if backtest["split"] == "train":
        title = f"On its own training days: {_lower(title)}"
    return title, [" ".join(told), " ".join(_cautions(backtest, greedy["sr"]))]


def _verdict_of_several(backtest: dict[str, Any]) -> tuple[str, list[str]]:
    groups, count = backtest["groups"], len(backtest["symbols"])
    whole = groups["all"]
    greedy, hold = _sharpes(whole)
    title = f"{count} symbols: " + _lower(
        _comparison(greedy, hold, whole["random"]["percentile"]["greedy"])
    )
    if backtest["split"] == "train":
        title = f"On its own training days, {_lower(title)}"
    told = [f"With the capital in equal parts, one a symbol, {_together(whole)}"]
    told += [
        f"Ahead of buy-and-hold are {whole['ahead_of_buy_and_hold']} of {count} symbols, and of "
        f"95% of random policies {whole['ahead_of_95_percent']}, where chance alone makes it "
        f"{number(0.05 * count, 1)}.",
        _pairs(whole["paired"]),
    ]
    if "held_out" in groups:
        some = len(groups["held_out"]["symbols"])
        told.append(f"On the {some} that it never learnt from, {_together(groups['held_out'])}")
    cautions = _cautions({**backtest, "dates": whole["dates"]}, greedy)
    if backtest["left_out"]:
        left_out = ", ".join(backtest["left_out"])
        cautions.append(f"Not tested, for they have fewer than 2 bars here: {left_out}.")
    return title, [" ".join(told), " ".join(cautions)]


def _sharpes(group: dict[str, Any]) -> tuple[float | None, float | None]:
    greedy, hold = (
        group["policies"][key]["metrics"]["standard"]["sr"] for key in ("greedy", "buy_and_hold")
    )
    return greedy, hold


def _together(group: dict[str, Any]) -> str:
    """How a group of symbols did as one."""
    (greedy, hold), chance = _sharpes(group), group["random"]
    return (
        f"the greedy policy's Sharpe ratio is {number(greedy)}, buy-and-hold's {number(hold)}; it "
        f"is ahead of {percent(chance['percentile']['greedy'], 1)} of {chance['episodes']:,} "
        "random policies that trade the same symbols."
    )


def _pairs(paired: dict[str, Any]) -> str:
    error = paired["standard_error"]
    told = "" if error is None else f" (standard error {number(1e4 * error, 1)}, days as clusters)"
    return (
        f"A day's return is on average {number(1e4 * paired['mean'], 1)} basis points above that "
        f"of holding the same symbol{told}."
    )


def _comparison(greedy: float | None, hold: float | None, percentile: float | None) -> str:
    if not (finite(greedy) and finite(hold) and finite(percentile)):
        return "No verdict: a Sharpe ratio is undefined"
    against = "Ahead of" if greedy > hold else "Behind" if greedy < hold else "Level with"
    if percentile >= 95:
        luck = f"ahead of {percent(percentile, 1)} of random policies, on one window"
    elif percentile >= 50:
        luck = "within the reach of luck"
    else:
        luck = "below the median random policy"
    return f"{against} buy-and-hold; {luck}"


def _exposure(backtest: dict[str, Any]) -> tuple[str, str]:
    """A title for a policy that (all but) always holds one position, else ""; and a sentence."""
    # The first position is the account's before its first decision.
    position = np.array(backtest["policies"]["greedy"]["position"][1:])
    long, flat, short = ((position == side).mean() for side in (1, 0, -1))
    parts = [f"{long:.0%} of days long", f"{flat:.0%} flat"]
    if backtest["positions"] == "long_short":
        parts.append(f"{short:.0%} short")
    trades = len(backtest["trades"])
    sentence = f"It was {', '.join(parts)}, with {trades} trade{'' if trades == 1 else 's'}."
    for share, title, words in (
        (long, "Always long: buy-and-hold under another name", "chose when to be in the market"),
        (flat, "Always flat: it took no position", "took a position"),
        (short, "Always short: one bet against the market", "chose when to be in the market"),
    ):
        if share == 1:
            return title, f"{sentence} It never {words}."
        if share >= _CONSTANT:
            return f"All but {_lower(title)}", f"{sentence} It hardly ever {words}."
    if long > 0 and trades == 1:
        return "Bought once and held: buy-and-hold, begun later", sentence
    return "", sentence


def _invested(backtest: dict[str, Any]) -> str:
    """Of a portfolio: what it held, and how it compares with equal parts of all."""
    weights = np.array(backtest["policies"]["greedy"]["weights"][1:])
    equal = backtest["policies"]["equal_weight"]["metrics"]["standard"]
    traded = np.abs(np.diff(weights, axis=0)).sum(1).mean() if len(weights) > 1 else 0.0
    return (
        f"Of its equity {np.abs(weights).sum(1).mean():.0%} was invested, and its parts moved by "
        f"{traded:.1%} of it a day, drift included. Equal parts of all {weights.shape[1]} assets "
        f"returned {percent(equal['cr'], 1)} at {number(equal['sr'])}; against them, "
        f"{_paired(backtest['paired']['equal_weight'])}."
    )


def _paired(paired: dict[str, Any]) -> str:
    mean, error = paired["mean"], paired["standard_error"]
    told = f"a day's return is on average {number(1e4 * mean, 1)} basis points higher"
    if error is None:
        return told
    low, high = (number(1e4 * (mean + side * 1.96 * error), 1) for side in (-1, 1))
    return f"{told} (95% interval {low} to {high})"


def _cautions(backtest: dict[str, Any], sharpe: float | None) -> list[str]:
    days = len(backtest["dates"]) - 1
    caution = "One window and one seed prove little"
    if finite(sharpe):
        error = _sharpe_error(sharpe, days, backtest["dates"][0], backtest["dates"][-1])
        caution += (
            f": over {days} days, the standard error of this Sharpe ratio is about {error:.1f}"
        )
    told = [f"{caution}."]
    if backtest["split"] == "train":
        told.append("These days were trained on: the result says nothing about other days.")
    if not backtest["anonymised"]:
        told.append("The prompts name the ticker or the dates: the model may remember this period.")
    if backtest["fill"] == "same_close":
        told.append("Orders fill at the very close they were decided on, which flatters.")
    if not backtest["fee_bps"] and not backtest["slippage_bps"]:
        told.append("Trading is free of fees and slippage here, which flatters.")
    return told


def _sharpe_error(sharpe: float, days: int, start: str, end: str) -> float:
    """Standard error of an annualised Sharpe ratio of independent returns (Lo 2002, equation 9)."""
    years = (date.fromisoformat(end) - date.fromisoformat(start)).days / 365.25
    return math.sqrt(1 / years + sharpe**2 / (2 * days))


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def training_facts(config: TrainConfig, updates: list[dict[str, Any]]) -> dict[str, str]:
    """What was trained, how, and on what."""
    policy, data, simulator = config.policy, config.data, config.simulator
    layers = f"top {policy.top_layers} layer{'' if policy.top_layers == 1 else 's'}"
    adapters = {"lora": "LoRA rank", "qlora": "QLoRA rank"}.get(policy.adaptation)
    how = f"{adapters} {policy.lora_rank}" if adapters else "all weights"
    trained = f"{layers} trained ({how}), the rest" if policy.top_layers else "heads trained, it"
    env_steps = updates[-1].get("env_steps") if updates else 0
    days = data.train.replace("..", " to ") or "the first 80% of days"
    symbols = f", symbols {data.symbols}" if data.symbols else ""
    if data.split_by_symbol:
        symbols += f" without {data.split_by_symbol}"
    return {
        "Model": f"{policy.model}; {trained} frozen in {policy.trunk_weights}",
        "Training": f"{config.algorithm.algorithm.upper()}, {len(updates):,} of {config.updates:,} "
        f"updates, {number(env_steps, 0)} steps in {config.rollout.num_envs:,} environments; "
        f"seed {config.seed}",
        "Trained on": f"{data.data}{symbols}, {days}; reward: {simulator.reward.replace('_', ' ')}",
    }


_DIVIDENDS = {
    "reinvest": "reinvested at the close of their day, free of costs, for the policy, buy-and-hold "
    "and random policies alike",
    "cash": "paid in cash, idle until a position is next opened: where prices rise, buy-and-hold "
    "earns less than its total return, and a policy that trades is flattered beside it",
}


def backtest_facts(backtest: dict[str, Any]) -> dict[str, str]:
    """What was tested on, and by which rules."""
    split = "held-out days" if backtest["split"] == "test" else f"split {backtest['split']}"
    names = "no ticker and no date" if backtest["anonymised"] else "the ticker or the dates"
    fee, slippage = (number(backtest[key], None) for key in ("fee_bps", "slippage_bps"))
    several = "groups" in backtest
    dates = backtest["groups"]["all"]["dates"] if several else backtest["dates"]
    tested = f"{len(backtest['symbols'])} symbols" if several else backtest["symbol"]
    return {
        "Tested on": f"{tested}, {backtest['start']} to {backtest['end']} ({split}, "
        f"{len(dates):,} closes); prompts name {names}",
        "Rules": f"{backtest['positions'].replace('_', ' or ')}; filled at the "
        f"{backtest['fill'].replace('_', ' ')}; fee {fee} bp, slippage {slippage} bp of the "
        "traded value",
        # A backtest from before there was a choice paid them in cash.
        "Dividends": _DIVIDENDS[backtest.get("dividends", "cash")],
    }
