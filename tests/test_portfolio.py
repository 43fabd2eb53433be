"""The task `portfolio` against a slow twin, and what must hold of any account."""

import dataclasses

import numpy as np
import portfolio_oracle as oracle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastflag.config import PortfolioConfig
from fastflag.files import InputError
from fastflag.market.compiled.portfolio import LANES
from fastflag.market.compiled.portfolio_constants import CODES, FILLED
from fastflag.market.portfolio_accounts import PortfolioAccounts
from fastflag.market.random_numbers import uniform
from fastflag.market.tasks import rolling
from fastflag.market.tasks.portfolio import ACTIONS, KEEP, NEUTRAL, OUT, OVER, SHORT, Portfolio
from fastflag.market.tasks.slot_codes import decode, side_of

FILLS = ("next_open", "next_close", "same_close")
FREE = {"fee_bps": 0.0, "slippage_bps": 0.0, "borrow_bps": 0.0}

configs = st.builds(
    PortfolioConfig,
    fill=st.sampled_from(FILLS),
    positions=st.sampled_from(("long_only", "long_short")),
    reward=st.sampled_from(("sharpe", "log_return")),
    fee_bps=st.sampled_from((0.0, 10.0, 900.0)),
    slippage_bps=st.sampled_from((0.0, 5.0)),
    borrow_bps=st.sampled_from((0.0, 300.0)),
    max_weight=st.sampled_from((1.0, 0.4, 0.1)),
    rebalance_every=st.sampled_from((1, 1, 3)),
    delisted_after=st.sampled_from((20, 2, 1)),
    delisting_loss=st.sampled_from((0.0, 0.3, 1.0)),
    ruin=st.sampled_from((0.01, 0.6)),
)
markets = st.builds(
    oracle.random_market,
    seed=st.integers(0, 10**6),
    assets=st.integers(1, 5),
    days=st.integers(2, 25),
    missing=st.sampled_from((0.0, 0.2, 0.6)),
    split=st.sampled_from((0.0, 0.2)),
    dividend=st.sampled_from((0.0, 0.3)),
    volatility=st.sampled_from((0.01, 0.1, 0.4)),
)
examples = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def random_actions(random, task, count):
    """Keep as often as all others."""
    actions = random.integers(0, len(task.actions), (count, task.slots))
    return np.where(random.random(actions.shape) < 0.4, KEEP, actions)


def assert_same(accounts, others):
    for name, array in accounts.arrays().items():
        np.testing.assert_array_equal(array, getattr(others, name), err_msg=name)


# Against the twin -------------------------------------------------------------------------------


@examples
@given(markets, configs, st.integers(0, 10**6))
def test_equals_the_oracle(market, config, seed):
    random = np.random.default_rng(seed)
    task = Portfolio.of(config, market)
    twins = [oracle.Account(market, config) for _ in range(3)]
    accounts = task.start(3)
    for day in range(len(market.dates) - 1):
        actions = random_actions(random, task, 3)
        mask = task.allowed(day, np.sign(accounts.holding))
        reward, terminated = task.step(accounts, day, actions)
        for b, twin in enumerate(twins):
            for k in twin.slots:
                names = [task.actions[a] for a in np.flatnonzero(mask[b, k])]
                assert sorted(names) == sorted(twin.allowed(k, day)), (b, k, day)
            named = [task.actions[a] for a in actions[b]]
            expected, ruined, _ = twin.step(day, named)
            assert terminated[b] == ruined and accounts.alive[b] == twin.alive
            scale = max(config.cash, twin.equity, abs(twin.cash), twin.turnover)
            worth = [twin.worth(k, day + 1) for k in twin.slots]
            np.testing.assert_allclose(accounts.holding[b], worth, rtol=0, atol=1e-11 * scale)
            for name in ("cash", "equity", "costs"):
                wanted = getattr(twin, name)
                assert abs(getattr(accounts, name)[b] - wanted) <= 1e-11 * scale, (name, day)
            held = np.abs(worth) > 1e-6 * twin.equity
            ratios = np.array([twin.ratio(k, day + 1) for k in twin.slots])
            np.testing.assert_allclose(accounts.ratio[b][held], ratios[held], rtol=1e-7)
            waiting = [np.nan if w is None else w for w in twin.waiting]
            np.testing.assert_array_equal(accounts.pending[b], waiting)
            assert abs(accounts.sharpe[b] - twin.sharpe) <= 1e-9 * max(1.0, abs(twin.sharpe))
            assert abs(reward[b] - expected) <= 1e-9 * max(1.0, abs(twin.sharpe))
    for b, twin in enumerate(twins):
        balance = config.cash + twin.gains - accounts.costs[b]
        if twin.alive:
            scale = max(config.cash, twin.turnover)
            assert abs(balance - accounts.equity[b]) <= 1e-9 * scale


@examples
@given(markets, configs, st.integers(0, 10**6))
def test_what_holds_of_every_account(market, config, seed):
    """No cash or holding below 0 long only, nothing above the cap after a fill at the close, equity
    is what is held, rewards add up."""
    random = np.random.default_rng(seed)
    task = Portfolio.of(config, market)
    accounts = task.start(6)
    total = np.zeros(6)
    for day in range(len(market.dates) - 1):
        actions = random_actions(random, task, 6)
        before = PortfolioAccounts.from_arrays(accounts.arrays())
        reward, _ = task.step(accounts, day, actions)
        total += reward
        held = accounts.cash + accounts.holding.sum(1)
        scale = np.maximum(1.0, np.abs(accounts.cash) + np.abs(accounts.holding).sum(1))
        assert (np.abs(held - accounts.equity) <= 1e-12 * scale).all()
        if config.positions == "long_only":
            assert (accounts.cash >= 0).all() and (accounts.holding >= 0).all()
        if config.fill == "next_close" and config.borrow_bps == 0:
            # What is kept may grow above the cap; what is ordered may not.
            filled = task.allowed(day, before.holding)[..., OVER] & (actions == OVER)
            filled &= (task.nights[day, :, FILLED] != 0.0) & accounts.alive[:, None]
            weight = np.abs(accounts.holding) / accounts.equity[:, None]
            assert (weight[filled] <= config.max_weight + 1e-12).all()
        assert np.isfinite(accounts.ratio).all() and np.isfinite(total).all()
    if config.reward == "sharpe":
        np.testing.assert_allclose(total, accounts.sharpe, atol=1e-11)
    else:
        floor = config.ruin * config.cash
        wealth = np.log(np.maximum(accounts.equity, floor) / config.cash)
        np.testing.assert_allclose(total, wealth, atol=1e-10)


@examples
@given(markets, configs, st.integers(0, 10**6))
def test_an_allowed_action_executes_and_another_is_keep(market, config, seed):
    """An order alone is filled or waits for a bar; what is masked changes nothing."""
    random = np.random.default_rng(seed)
    task = Portfolio.of(dataclasses.replace(config, delisted_after=100, ruin=0.01), market)
    keep, accounts = np.full((1, task.slots), KEEP), task.start(1)
    for day in range(len(market.dates) - 1):
        mask = task.allowed(day, np.sign(accounts.holding))[0]
        slot, name = random.integers(task.slots), random.integers(len(task.actions))
        action = keep.copy()
        action[0, slot] = name
        other = PortfolioAccounts.from_arrays(accounts.arrays())
        waited = not np.isnan(accounts.pending).all()
        task.step(accounts, day, action)
        task.step(other, day, keep)
        if not mask[slot, name] or name == KEEP:
            assert_same(accounts, other)
        elif accounts.alive[0] and not waited:
            units = {OUT: 0.0, NEUTRAL: 1.0, OVER: 2.0, SHORT: -1.0}[name]
            if task.nights[day, slot, FILLED] == 0.0:
                assert accounts.pending[0, slot] == units
            else:
                # Alone it gets all that is free, nothing where that is nothing.
                assert np.sign(accounts.holding[0, slot]) in (0.0, np.sign(units))
                free = other.cash[0] > 1e-9 * other.equity[0]
                assert not free or np.sign(accounts.holding[0, slot]) == np.sign(units)


def case_of(config, size=40, seed=2):
    """A market of holes and ruin, 33 steps with a restart in between, carried accounts and a random
    policy over what they can reach: (task, accounts, moments, restarts, cdf, row_of)."""
    random = np.random.default_rng(seed)
    market = oracle.random_market(seed, 4, 40, volatility=0.2)
    task = Portfolio.of(config, market)
    accounts = task.start(size)
    for day in range(3):
        task.step(accounts, day, random_actions(random, task, size))
    moments = np.concatenate([np.arange(3, 15), np.arange(9, 30)])
    restarts = np.arange(len(moments)) == 12
    reached = task.reachable(range(3, 32), accounts)
    place, slot, code = np.nonzero(reached)
    row_of = np.full((40, task.slots, CODES), -1, np.int32)
    row_of[place + 3, slot, code] = np.arange(len(place))
    weights = random.dirichlet(np.ones(len(task.actions)), len(place))
    weights *= task.allowed(place + 3, side_of(code), slot)
    cdf = np.cumsum(weights / weights.sum(1, keepdims=True), axis=1)
    return task, accounts, moments, restarts, cdf, row_of


RULES = [
    PortfolioConfig(fill=fill, positions=positions, ruin=0.5, **others)
    for fill in FILLS
    for positions, others in (
        ("long_only", {"max_weight": 0.4, "rebalance_every": 2}),
        ("long_short", {"reward": "sharpe", "delisted_after": 2}),
    )
]


@pytest.mark.parametrize("config", RULES, ids=lambda config: f"{config.fill} {config.positions}")
def test_a_rollout_is_a_loop_of_steps(config):
    """Rows, actions drawn by each slot's number, rewards and accounts, to the bit."""
    task, accounts, moments, restarts, cdf, row_of = case_of(config, size=LANES + 7)
    looped = PortfolioAccounts.from_arrays(accounts.arrays())
    steps = task.rollout(accounts, moments, restarts, cdf, row_of, 11, 0, 5)
    slots, count = np.arange(task.slots), len(looped)
    for s, moment in enumerate(moments):
        if restarts[s]:
            looped.reset(np.ones(count, bool))
        row = row_of[moment, slots, task.code(looped, moment)]
        np.testing.assert_array_equal(steps.row[:, s], row)
        np.testing.assert_array_equal(steps.valid[:, s], looped.alive)
        numbers = [uniform(11, np.arange(count), (5 + s) * task.slots + k) for k in slots]
        drawn = (np.stack(numbers, 1)[..., None] * cdf[row, -1:] >= cdf[row]).sum(-1)
        drawn[~looped.alive] = KEEP
        np.testing.assert_array_equal(steps.action[:, s], drawn)
        reward, terminated = task.step(looped, moment, drawn)
        np.testing.assert_array_equal(steps.reward[:, s], reward)
        np.testing.assert_array_equal(steps.terminated[:, s], terminated)
        row = row_of[moment + 1, slots, task.code(looped, moment + 1)]
        np.testing.assert_array_equal(steps.next_row[:, s], row)
    assert_same(accounts, looped)
    assert steps.terminated.any() and (steps.action != KEEP).any(0).any(0).all()


@pytest.mark.parametrize("config", RULES[1:3], ids=str)
def test_batches_and_parts_and_threads_change_no_bit(config, monkeypatch):
    """Each account alone with its seed, a rollout in parts, and several threads."""
    count = 2 * LANES + 3
    task, accounts, moments, restarts, cdf, row_of = case_of(config, size=count)
    before = accounts.arrays() | {name: a.copy() for name, a in accounts.arrays().items()}
    whole = vars(task.rollout(accounts, moments, restarts, cdf, row_of, 11, 0, 5))
    for b in (0, LANES - 1, LANES, count - 1):
        alone = PortfolioAccounts(**before).take(np.array([b]))
        out = task.rollout(alone, moments, restarts, cdf, row_of, 11 + b, 0, 5)
        for name, array in vars(out).items():
            np.testing.assert_array_equal(array[0], whole[name][b], err_msg=name)
        assert_same(alone, accounts.take(np.array([b])))
    parted = PortfolioAccounts.from_arrays(before)
    for part in (slice(0, 7), slice(7, 20), slice(20, None)):
        policy = cdf, row_of, 11, 0, 5 + part.start
        out = task.rollout(parted, moments[part], restarts[part], *policy)
        for name, array in vars(out).items():
            np.testing.assert_array_equal(array, whole[name][:, part], err_msg=name)
    assert_same(parted, accounts)
    monkeypatch.setattr(rolling, "_THREADED_STEPS", 1)
    monkeypatch.setattr(rolling.numba_config, "NUMBA_NUM_THREADS", 3)
    several = PortfolioAccounts.from_arrays(before)
    for name, array in vars(
        task.rollout(several, moments, restarts, cdf, row_of, 11, 0, 5)
    ).items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)
    assert_same(several, accounts)


@examples
@given(markets, configs, st.integers(0, 10**6))
def test_a_batch_is_its_accounts_one_by_one(market, config, seed):
    """Also where the accounts are at moments of their own."""
    random = np.random.default_rng(seed)
    task = Portfolio.of(config, market)
    batch, single = task.start(5), [task.start(1) for _ in range(5)]
    for _ in range(4):
        moments = random.integers(0, len(market.dates) - 1, 5)
        actions = random_actions(random, task, 5)
        reward, terminated = task.step(batch, moments, actions)
        for b, one in enumerate(single):
            alone = task.step(one, moments[b], actions[b : b + 1])
            assert (reward[b], terminated[b]) == (alone[0][0], alone[1][0])
            assert_same(one, batch.take(np.array([b])))


def test_rollout_refuses_what_can_not_be():
    task, accounts, moments, restarts, cdf, row_of = case_of(PortfolioConfig())
    absent = row_of.copy()
    absent[14, 2, 0] = -1
    with pytest.raises(RuntimeError, match="code 0 of S2 has no prompt at moment 14"):
        task.rollout(accounts, moments, restarts, cdf, absent, 0, 0, 0)
    broken = cdf.copy()
    broken[4] = np.nan
    with pytest.raises(RuntimeError, match="row 4"):
        task.rollout(accounts, moments, restarts, broken, row_of, 0, 0, 0)
    with pytest.raises(ValueError, match="consecutive"):
        task.rollout(accounts, moments, np.zeros_like(restarts), cdf, row_of, 0, 0, 0)
    with pytest.raises(ValueError, match="after it"):
        task.rollout(accounts, np.array([39]), np.array([True]), cdf, row_of, 0, 0, 0)
    for action in (-1, SHORT):
        with pytest.raises(ValueError, match="actions"):
            task.step(accounts, 0, np.full((len(accounts), 4), action))


# No look-ahead ----------------------------------------------------------------------------------


def changed(market, day, how):
    """The same market up to `day`, another after it, or none."""
    names = ("open", "high", "low", "close", "volume", "split", "dividend")
    arrays = {name: getattr(market, name).copy() for name in names}
    if how == "cut":
        arrays = {name: array[: day + 1] for name, array in arrays.items()}
        return dataclasses.replace(market, dates=market.dates[: day + 1], **arrays)
    for name in ("open", "high", "low", "close"):
        arrays[name][day + 1 :] *= 3.7 if how == "scaled" else np.nan
    if how == "scaled":
        arrays["split"][day + 1 :] = 5.0
        arrays["dividend"][day + 1 :] += 2.0
    return dataclasses.replace(market, **arrays)


@pytest.mark.parametrize("how", ["scaled", "missing", "cut"])
@pytest.mark.parametrize("config", RULES, ids=lambda config: f"{config.fill} {config.positions}")
def test_nothing_depends_on_the_future(config, how):
    """Accounts, rewards and codes up to a close, and what is allowed at it."""
    market = oracle.random_market(5, 3, 16, missing=0.3, split=0.2, dividend=0.4)
    task = Portfolio.of(config, market)
    actions = [random_actions(np.random.default_rng(day), task, 16) for day in range(15)]
    for day in range(1, 15):
        other = Portfolio.of(config, changed(market, day, how))
        one, two = task.start(16), other.start(16)
        for t in range(day):
            mask = task.allowed(t, np.sign(one.holding))
            np.testing.assert_array_equal(mask, other.allowed(t, np.sign(two.holding)))
            for now, then in zip(
                task.step(one, t, actions[t]), other.step(two, t, actions[t]), strict=True
            ):
                np.testing.assert_array_equal(now, then)
            assert_same(one, two)
            np.testing.assert_array_equal(task.code(one, t + 1), other.code(two, t + 1))
        mask = task.allowed(day, np.sign(one.holding))
        np.testing.assert_array_equal(mask, other.allowed(day, np.sign(two.holding)))


# Codes ------------------------------------------------------------------------------------------


def test_codes_decode_to_distinct_states():
    states = [decode(code) for code in range(CODES)]
    assert len(set(states)) == CODES and states[0] == (0, 0, 0)
    np.testing.assert_array_equal(side_of(np.arange(CODES)), [side for side, _, _ in states])
    with pytest.raises(ValueError, match="codes"):
        decode(CODES)


def test_a_code_tells_weight_and_open_profit():
    """Four assets: quarters of a quarter of equity, steps of 2% rounded half away from zero."""
    task = Portfolio.of(PortfolioConfig(), oracle.random_market(0, 4, 5, missing=0.0))
    accounts = task.start(1)
    accounts.equity[0] = 1000.0
    accounts.holding[0] = [0.0, 0.01, -95.0, 990.0]
    accounts.ratio[0] = [1.0, 1.011, 1.05, 0.2]
    told = [decode(code) for code in task.code(accounts, 0)[0]]
    assert told == [(0, 0, 0), (1, 1, 1), (-1, 2, -3), (1, 16, -10)]


@examples
@given(markets, configs, st.integers(0, 10**6), st.integers(0, 24))
def test_every_visited_code_is_reachable(market, config, seed, carried):
    random = np.random.default_rng(seed)
    task = Portfolio.of(config, market)
    accounts, last = task.start(24), len(market.dates) - 1
    start = min(carried, last)
    for day in range(start):
        task.step(accounts, day, random_actions(random, task, 24))
    reached = task.reachable(range(start, last + 1), accounts)
    assert reached[:, :, 0].all()
    for day in range(start, last + 1):
        assert reached[day - start, np.arange(task.slots), task.code(accounts, day)].all()
        if day < last:
            task.step(accounts, day, random_actions(random, task, 24))


# Rules by hand ----------------------------------------------------------------------------------


def test_the_fixed_point_of_costs_by_hand():
    """All cash into two assets at 1%, then one to the other: mu = 1 - c sum |mu w' - w|."""
    prices = np.array([[10.0, 10.0], [10.0, 10.0], [10.0, 10.0]])
    columns = [(p, p, np.ones(3), np.zeros(3), np.ones(3, bool)) for p in prices.T]
    rules = PortfolioConfig(fill="same_close", fee_bps=100, slippage_bps=0, cash=1.0)
    task = Portfolio.of(rules, oracle.market_of(columns))
    accounts = task.start(1)
    task.step(accounts, 0, np.array([[NEUTRAL, NEUTRAL]]))
    np.testing.assert_allclose(accounts.holding, 1 / 1.01 / 2, rtol=1e-15)
    task.step(accounts, 1, np.array([[OUT, OVER]]))
    # mu = 1 - c (1/2 + mu - 1/2) of 1 / 1.01.
    np.testing.assert_allclose(accounts.equity, 1 / 1.01 / 1.01, rtol=1e-15)
    assert accounts.holding[0, 0] == 0.0 and abs(accounts.cash[0]) < 1e-15


@examples
@given(st.integers(2, 40), st.sampled_from((1.0, 30.0, 900.0, 9_000.0)), st.integers(0, 10**6))
def test_weights_are_of_what_costs_leave(assets, fee, seed):
    """Both halves of the fixed point, to rounding: prices that stand still take nothing else."""
    random = np.random.default_rng(seed)
    ones = np.ones(8)
    columns = [(ones, ones, ones, 0.0 * ones, np.ones(8, bool))] * assets
    rules = PortfolioConfig(fill="same_close", fee_bps=fee, slippage_bps=0, cash=1.0, ruin=1e-12)
    task = Portfolio.of(rules, oracle.market_of(columns))
    accounts, units_of = task.start(5), np.array([0.0, np.nan, 1.0, 2.0])
    for day in range(7):
        actions = random.choice([OUT, NEUTRAL, OVER], (5, assets))
        held, equity = accounts.holding.copy(), accounts.equity.copy()
        task.step(accounts, day, actions)
        units = units_of[actions]
        weights = units / np.maximum(units.sum(1), 1.0)[:, None]
        left = accounts.equity[:, None]
        np.testing.assert_allclose(accounts.holding, weights * left, rtol=0, atol=1e-14)
        traded = np.abs(weights * left - held).sum(1)
        np.testing.assert_allclose(accounts.equity, equity - fee / 1e4 * traded, rtol=0, atol=1e-14)


@pytest.mark.parametrize("fill", FILLS)
def test_holding_earns_what_the_prices_and_dividends_do(fill):
    """Splits, dividends, gaps: a position that is kept is worth its total return."""
    market = oracle.random_market(3, 3, 30, missing=0.2, split=0.2, dividend=0.4)
    task = Portfolio.of(PortfolioConfig(fill=fill, delisted_after=30, **FREE), market)
    units = np.full((29, 3), np.nan)
    first = int(np.flatnonzero(np.isfinite(market.close[:-1]).all(1))[0])
    second = first + 1 + int(np.flatnonzero(np.isfinite(market.close[first + 1 :]).all(1))[0])
    units[first] = 1.0
    equity = task.equities(range(30), 1, 0, units)[0]
    closes = np.isfinite(market.close)
    wealth = np.ones(3)
    held = np.full((30, 3), np.nan)
    for k in range(3):
        due, last = 0.0, market.close[second, k]
        for t in range(second, 30):
            if t > second:
                due = due / market.split[t, k] + market.dividend[t, k]
                last = last / market.split[t, k]
                if closes[t, k]:
                    wealth[k] *= (market.close[t, k] + due) / last
                    last, due = market.close[t, k], 0.0
            held[t, k] = wealth[k]
    accounts = task.start(1)
    for t in range(second):
        actions = np.full((1, 3), NEUTRAL if t == first else KEEP)
        task.step(accounts, t, actions)
    expected = accounts.cash[0] + (accounts.holding[0] * held[second:]).sum(1)
    np.testing.assert_allclose(equity[second:], expected, rtol=1e-12)


def test_a_delisted_asset_is_paid_out_less_the_loss():
    """After three days without a bar; before, it stays at its last price."""
    close = np.array([10.0, 10.0, 12.0, np.nan, np.nan, np.nan, np.nan])
    columns = [(close, close, np.ones(7), np.zeros(7), np.isfinite(close))]
    rules = PortfolioConfig(
        fill="same_close", delisted_after=3, delisting_loss=0.25, cash=100.0, **FREE
    )
    task = Portfolio.of(rules, oracle.market_of(columns))
    units = np.array([[1.0], *[[np.nan]] * 5])
    equity = task.equities(range(7), 1, 0, units)[0]
    np.testing.assert_allclose(equity, [100, 100, 120, 120, 120, 90, 90], rtol=1e-14)


def test_random_policies_are_uniform_over_what_is_allowed():
    """As in a rollout from a table of equal chances."""
    market = oracle.random_market(4, 3, 12)
    task = Portfolio.of(PortfolioConfig(positions="long_short"), market)
    equity = task.equities(range(12), 5, seed=9)
    accounts, count = task.start(5), len(ACTIONS)
    for t in range(11):
        np.testing.assert_array_equal(equity[:, t], accounts.equity)
        mask = task.allowed(t, np.sign(accounts.holding))
        number = np.stack([uniform(9, np.arange(5), t * 3 + k) for k in range(3)], 1)
        names = mask.sum(-1)
        place = (number * names).astype(int)
        action = np.full((5, 3), KEEP)
        for b, k in np.ndindex(5, 3):
            action[b, k] = np.flatnonzero(mask[b, k])[place[b, k]]
        assert count == 5
        task.step(accounts, t, action)
    np.testing.assert_array_equal(equity[:, -1], accounts.equity)


def test_accounts_come_back_from_their_arrays():
    task = Portfolio.of(PortfolioConfig(), oracle.random_market(0, 3, 5))
    accounts = task.start(4)
    task.step(accounts, 0, np.full((4, 3), NEUTRAL))
    assert_same(PortfolioAccounts.from_arrays(accounts.arrays()), accounts)
    with pytest.raises(ValueError, match="accounts need"):
        PortfolioAccounts.from_arrays({"cash": np.zeros(4)})
    with pytest.raises(ValueError, match="holding"):
        PortfolioAccounts.from_arrays(accounts.arrays() | {"holding": np.zeros(4)})
    with pytest.raises(ValueError, match="pending"):
        PortfolioAccounts.from_arrays(accounts.arrays() | {"pending": np.zeros((4, 2))})


def test_costs_of_all_that_is_traded_are_refused():
    with pytest.raises(InputError, match="fee and slippage"):
        PortfolioConfig(fee_bps=6000, slippage_bps=4000)
