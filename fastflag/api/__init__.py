"""FastFLAG from Python; the command line is written on it.

    import fastflag as ff

    run = ff.train("runs/mine", data="csv:bars.csv", symbol="AAPL")
    run.metrics                  # a row an update
    run.backtest().to_frame()    # a row a held-out day
    run.decide("2020-12-31")     # the action at one close

A run is its folder: a Run holds nothing that the folder lacks, and one that is opened again is the
same. torch and Numba are imported by what needs them.

What the user gave wrong raises InputError, whose text is one line; so does a file that is missing,
damaged or can't be read. What can't be written (a full disk, a folder of somebody else's) raises
OSError, with the file as its `filename`; what was there before stays whole.
"""

from fastflag.api.machine import doctor, forget_proofs, plan, prove, ran_out
from fastflag.api.runs import Run, Track, load, metrics, open, train
from fastflag.evaluate.results import Backtest, Decision, Examination, MemoryPlan, Metrics
from fastflag.files import InputError

__all__ = [
    "Backtest",
    "Decision",
    "Examination",
    "InputError",
    "MemoryPlan",
    "Metrics",
    "Run",
    "Track",
    "doctor",
    "forget_proofs",
    "load",
    "metrics",
    "open",
    "plan",
    "prove",
    "ran_out",
    "train",
]
