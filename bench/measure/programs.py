"""Programs that a measurement runs: within a time, and ended with all that they have started."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from bench.measure.results import ROOT

TAIL = 4000  # characters that are kept of what a failing program says


class Failed(Exception):
    """A program did not do its work."""


def run_program(
    words: Sequence[str], limit: float, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Runs a program for at most `limit` seconds, and then ends it with all that it has started.

    Raises Failed at the limit.
    """
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        told, wrong = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise Failed(f"not done within {limit:.0f} s: {' '.join(words)}") from None
    except BaseException:
        # Ctrl-C: a child in a session of its own would go on, beside the next run.
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(words, process.returncode, told, wrong)


def run_json(words: Sequence[str], limit: float, environment: dict[str, str] | None = None) -> Any:
    """The last line that a program of ours prints; raises Failed with what it says instead."""
    done = run_program([sys.executable, *words], limit, environment)
    if done.returncode != 0:
        raise Failed((done.stderr or done.stdout)[-TAIL:])
    return json.loads(done.stdout.splitlines()[-1])
