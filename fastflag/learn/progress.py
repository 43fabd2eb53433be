"""What the user sees and keeps of a run: progress bar, metrics.jsonl, TensorBoard, phase times."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from fastflag.files import read_text, write_atomic


class PhaseTimer:
    """Wall-clock seconds of each phase of an update. Timed where it happens, in every run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The seconds since the last take."""
        seconds, self.seconds = self.seconds, {}
        return seconds


class _Board:
    """Scalars for TensorBoard, in an events file under `folder`. What earlier files have of steps
    from `start` on is void.

    TensorBoard's own writer hands events to a thread over a queue; Ctrl-C while the queue's lock is
    held leaves it held, and the program hangs when it closes the writer. This one has no thread.
    """

    def __init__(self, folder: Path, start: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.fastflag"
        self._writer = RecordWriter((folder / name).open("xb"))
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=start, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, scalars: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._writer.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
        self._writer.flush()


class Proving:
    """A bar on stderr while kernels prove themselves; it is not there before they begin."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("[bold]trying kernels on this GPU, once"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> "Proving":
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._progress.stop()

    def __call__(self, text: str, done: int, total: int) -> None:
        if self._task is None:
            self._task = self._progress.add_task("proving", total=total, text=text)
            self._progress.start()
        self._progress.update(self._task, completed=done, total=total, text=text)


class Log:
    """Writes each update to RUN/metrics.jsonl, to TensorBoard under RUN/tensorboard and to the
    console. Lines of updates from `start` on, left by a run that was killed, are dropped."""

    def __init__(self, run: Path, start: int, updates: int):
        self._path = run / "metrics.jsonl"
        write_atomic(self._path, "".join(_lines_before(self._path, start)))
        self._file = self._path.open("a", encoding="utf-8")
        self._board = _Board(run / "tensorboard", start)
        console = Console()
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=updates, completed=start, text="")

    def __enter__(self) -> "Log":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._board.close()
        self._file.close()

    def add(self, record: dict[str, Any]) -> None:
        """One update's record: scalars, and the seconds of its phases."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        scalars = {name: value for name, value in record.items() if isinstance(value, float)}
        seconds = {f"seconds/{name}": value for name, value in record["seconds"].items()}
        self._board.add(record["step"], scalars | seconds)
        text = (
            f"return {record['return']:+.3f}  sharpe {record['sharpe']:+.2f}"
            f"  entropy {record['entropy']:.3f}  kl {record['kl']:.4f}"
            f"  clip {record['clip_fraction']:.2f}"
            f"  {_thousands(record['steps_per_second'])} steps/s"
        )
        self._progress.update(self._task, completed=record["step"] + 1, text=text)
        if not self._progress.console.is_terminal:
            print(f"update {record['step'] + 1}  {text}", flush=True)


def _lines_before(path: Path, start: int) -> Iterator[str]:
    """The complete lines of updates before `start`; a line cut off by a kill is not one."""
    if not path.exists():
        return
    for line in read_text(path, errors="replace").splitlines():
        try:
            if json.loads(line)["step"] < start:
                yield line + os.linesep
        except (ValueError, KeyError, TypeError, RecursionError):
            continue


def _thousands(value: float) -> str:
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"
