"""Environments small enough to test, on markets with every nuisance."""

import gymnasium
import portfolio_oracle

import fastflag.gym  # noqa: F401, registers the environments
from fastflag.config import PortfolioConfig, SimulatorConfig

SINGLE, PORTFOLIO = IDS = ("FastFLAG/Single-v0", "FastFLAG/Portfolio-v0")


def settings_of(name, seed=0, horizon=7, market=None, **changes):
    """Short episodes."""
    if market is None:
        market = portfolio_oracle.random_market(seed, 3, days=40)
    if name == SINGLE:
        return {"market": market, "rules": SimulatorConfig(horizon=horizon, **changes)}
    return {"market": market, "rules": PortfolioConfig(**changes), "horizon": horizon}


def env_of(name, **settings):
    return gymnasium.make(name, **settings).unwrapped
