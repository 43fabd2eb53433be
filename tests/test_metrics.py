import empyrical
import numpy as np
import pytest

from fastflag.config import DataConfig
from fastflag.files import InputError
from fastflag.market.calendar import calendar_of
from fastflag.market.metrics import CONVENTIONS, metrics
from fastflag.market.sources import load

STOCK_TEST = ("2020-10-01", "2021-05-06")
CRYPTO_TEST = ("2023-04-05", "2023-11-05")

# CR, SR, AV, MDD of buy-and-hold. "paper-bh": as FLAG-Trader (arXiv 2502.11433) printed them, but
# BTC's CR, 21.821 there and 21.8216 in the data. "flag": by the rule of its own rows, all prices.
PUBLISHED = {
    ("msft", "paper-bh"): (15.340, 1.039, 24.980, 9.428),
    ("jnj", "paper-bh"): (13.895, 1.343, 17.500, 9.847),
    ("uvv", "paper-bh"): (36.583, 2.112, 29.299, 15.406),
    ("hon", "paper-bh"): (33.256, 2.347, 23.967, 9.195),
    ("btc", "paper-bh"): (21.822, 0.683, 37.426, 20.796),
    ("msft", "flag"): (16.654, 1.129, 24.946, 9.428),
    ("jnj", "flag"): (14.295, 1.386, 17.445, 9.847),
    ("uvv", "flag"): (38.235, 2.210, 29.257, 15.406),
    ("hon", "flag"): (34.342, 2.429, 23.913, 9.195),
    ("btc", "flag"): (21.822, 0.826, 31.098, 20.796),
}


@pytest.mark.parametrize(("symbol", "convention"), PUBLISHED)
def test_published_buy_and_hold(investorbench, symbol, convention):
    market = load(DataConfig(data=f"investorbench:{investorbench / symbol}.json"))
    days = market.days(*(CRYPTO_TEST if symbol == "btc" else STOCK_TEST))
    ours = metrics(market.close[days, 0], convention, calendar_of(market.dates))
    cells = tuple(round(ours[name], 3) for name in ("cr", "sr", "av", "mdd"))
    assert cells == PUBLISHED[symbol, convention]


@pytest.mark.parametrize(("calendar", "annual"), [("stock", 252), ("crypto", 365)])
def test_standard_is_empyrical(calendar, annual):
    random = np.random.default_rng(0)
    for length in (3, 20, 500):
        returns = random.normal(0.001, 0.02, length)
        returns[0] = -0.03  # a loss on the first day counts into the drawdown
        ours = metrics(100 * np.cumprod(np.append(1, 1 + returns)), "standard", calendar)
        theirs = {
            "cr": 100 * empyrical.cum_returns_final(returns),
            "sr": empyrical.sharpe_ratio(returns, annualization=annual),
            "av": 100 * empyrical.annual_volatility(returns, annualization=annual),
            "mdd": -100 * empyrical.max_drawdown(returns),
            "sortino": empyrical.sortino_ratio(returns, annualization=annual),
            "calmar": empyrical.calmar_ratio(returns, annualization=annual),
            "win_rate_daily": np.mean(returns > 0),
            "days": length,
        }
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_log_conventions_by_hand():
    values = np.array([100.0, 110.0, 99.0, 99.0, 120.0])
    logs = np.log([1.1, 0.9, 1.0, 120 / 99])
    drawdown = 100 * -np.log(0.9)  # from the peak at 1 + ln 1.1, by the factor 1 + ln 0.9
    flag = metrics(values, "flag", "crypto")
    av = logs.std(ddof=1) * np.sqrt(252)
    assert flag["cr"] == pytest.approx(100 * np.log(1.2))
    assert flag["av"] == pytest.approx(100 * av)
    assert flag["sr"] == pytest.approx(np.log(1.2) / (4 / 252) / av)
    assert flag["mdd"] == pytest.approx(drawdown)
    downside = np.sqrt(np.log(0.9) ** 2 / 4) * np.sqrt(252)
    assert flag["sortino"] == pytest.approx(np.log(1.2) / (4 / 252) / downside)
    assert flag["calmar"] == pytest.approx(100 * np.log(1.2) / (4 / 252) / drawdown)
    assert flag["win_rate_daily"] == pytest.approx(2 / 3)  # the unchanged day is neither
    bench = metrics(values, "investorbench", "stock")
    assert bench["av"] == pytest.approx(100 * logs.std(ddof=1) * np.sqrt(365))
    assert bench["sr"] == pytest.approx(bench["cr"] / (5 / 252) / bench["av"])
    assert metrics(values, "paper-bh", "stock")["cr"] == pytest.approx(100 * np.log(0.99))
    assert metrics(values, "paper-bh", "stock")["days"] == 3


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_undefined_is_nan(convention):
    constant = metrics(np.full(10, 7.0), convention, "stock")
    assert np.isnan(
        [constant[name] for name in ("sr", "sortino", "calmar", "win_rate_daily")]
    ).all()
    assert (constant["cr"], constant["av"], constant["mdd"]) == (0, 0, 0)
    # Steady growth: the deviation is nothing but rounding, no Sharpe ratio of 1e15.
    assert np.isnan(metrics(1.01 ** np.arange(50), convention, "stock")["sr"])
    for values in ([], [1.0], [1.0, np.nan, 2.0]):
        result = metrics(np.array(values), convention, "stock")
        assert np.isnan([value for name, value in result.items() if name != "days"]).all()


@pytest.mark.filterwarnings("error")
def test_total_loss():
    ruined = np.array([1.0, 0.5, 0.0, 0.0])
    standard = metrics(ruined, "standard", "stock")
    assert (standard["cr"], standard["mdd"], standard["calmar"]) == (-100, 100, -1)
    assert np.isnan(metrics(ruined, "flag", "stock")["cr"])
    metrics(np.array([1.0, 1e6]), "standard", "crypto")


def test_unknown_convention():
    with pytest.raises(InputError, match="unknown convention 'sharpe', one of standard"):
        metrics(np.ones(3), "sharpe", "stock")


def test_calendar():
    dates = np.arange("2024-01-01", "2024-01-06", dtype="datetime64[D]")
    assert calendar_of(dates) == "stock"
    every_day = np.arange(dates[0], dates[0] + 100)
    assert calendar_of(every_day) == calendar_of(every_day[:7]) == "crypto"
    # A session on one Saturday, later, moves no close of an earlier day.
    weekdays = every_day[np.is_busday(every_day)]
    assert calendar_of(np.append(weekdays, np.datetime64("2024-05-04"))) == "stock"


@pytest.mark.parametrize(
    ("traded", "calendar"),
    [
        ("1111100", "stock"),
        ("1111001", "stock"),  # Tel Aviv
        ("1111101", "stock"),  # currencies, which open on Sunday evening
        ("1111110", "stock"),
        ("1110011", "stock"),  # Tehran
        ("1111111", "crypto"),
    ],
)
@pytest.mark.parametrize("days", [21, 400])
def test_calendar_is_crypto_where_every_day_is_traded(traded, calendar, days):
    dates = np.arange("2024-01-01", days, dtype="datetime64[D]")  # from a Monday
    dates = dates[np.resize([day == "1" for day in traded], days)]
    assert calendar_of(dates) == calendar
    holes = np.random.default_rng(0).random(len(dates)) < 0.9
    assert calendar_of(dates[holes]) == calendar
