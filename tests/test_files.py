import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT

from fastflag.config import from_dict
from fastflag.files import InputError, printable, read_json, write_atomic


def test_written_whole_over_the_old_one(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, "new £\n")
    assert path.read_bytes() == b"new \xc2\xa3\n"
    write_atomic(str(path), b"newer")
    assert path.read_bytes() == b"newer"
    assert os.listdir(tmp_path) == ["a.json"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("failing", ["fsync", "replace", "chmod"])
def test_a_failure_leaves_the_old_file_and_no_other(failing, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomic(path, "new")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_interrupted_in_mid_write(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a.json", "new")
    assert os.listdir(tmp_path) == []


def test_nothing_is_replaced_before_it_is_on_the_disk(tmp_path, monkeypatch):
    calls = []

    def recorded(name, real):
        return lambda *arguments: calls.append(name) or real(*arguments)

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, recorded(name, getattr(os, name)))
    write_atomic(tmp_path / "a.json", "new")
    assert calls == ["fsync", "replace"]


KILLED = """
import os, signal
from fastflag import files
os.fsync = lambda handle: os.kill(os.getpid(), signal.{signal})
files.write_atomic({path!r}, "half")
"""


def started(path, signal):
    """A process that writes `path` and is killed, or stopped, before it is done."""
    code = KILLED.format(signal=signal, path=str(path))
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    path, mine = tmp_path / "a[1].json", tmp_path / ".a[1].json.original"
    started(path, "SIGKILL").wait()
    started(tmp_path / "b.json", "SIGKILL").wait()
    mine.write_text("a user's")
    assert sorted(name[:7] for name in os.listdir(tmp_path)) == [".a[1].j", ".a[1].j", ".b.json"]
    write_atomic(path, "new")
    left = [name for name in os.listdir(tmp_path) if not name.startswith(".b.json.")]
    assert sorted(left) == [mine.name, path.name] and len(os.listdir(tmp_path)) == 3


def test_what_is_still_being_written_stays(tmp_path):
    path = tmp_path / "a.json"
    other = started(path, "SIGSTOP")
    os.waitid(os.P_PID, other.pid, os.WSTOPPED)
    try:
        write_atomic(path, "new")
        assert path.read_text() == "new" and len(os.listdir(tmp_path)) == 2
    finally:
        other.send_signal(signal.SIGCONT)
        other.wait()
    assert path.read_text() == "half" and os.listdir(tmp_path) == ["a.json"]


def test_a_full_disk(tmp_path):
    """A limit on the size of files stands in for it: the write fails half-way."""
    (tmp_path / "a.json").write_text("old")
    code = """
import resource, signal
from fastflag.files import write_atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomic("a.json", "x" * 5000)
except OSError as error:
    print(error.filename)
"""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert (done.stdout.strip(), done.stderr) == ("a.json", "")
    assert (tmp_path / "a.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("folder", ["missing", "file", "/proc"])
def test_a_folder_that_can_not_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / folder / "a.json"
    with pytest.raises(OSError) as caught:
        write_atomic(path, "new")
    assert caught.value.filename == str(path)


def test_read_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, null, "ü"]}', encoding="utf-8")
    assert read_json(path) == {"a": [1, None, "ü"]}
    path.write_text('{"a": "ü"}', encoding="utf-8-sig")  # as Windows' editors write it
    assert read_json(path) == {"a": "ü"}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"a": 1', b"{'a': 1}", b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b"{} {}"],
)
def test_refused_json(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not valid JSON") as caught:
        read_json(path)
    assert str(caught.value).endswith(f", {path}")


def test_unreadable_json(tmp_path):
    with pytest.raises(InputError, match=r"No such file or directory, .*none\.json"):
        read_json(tmp_path / "none.json")
    with pytest.raises(InputError, match="Is a directory"):
        read_json(tmp_path)


@pytest.mark.parametrize("letter", ["x", "\x1b", "\U0010ffff", " "])
def test_an_error_is_never_longer_than_a_screen(letter):
    """What was wrong and where are told, whatever the length of what was given."""
    long = letter * 10**6
    with pytest.raises(InputError) as caught:
        from_dict({"policy": {"model": "m", "dtype": long}}, f"{'x' * 200}/config.json")
    said = str(caught.value)
    assert len(said) == 1000 and said.startswith("config key 'policy.dtype' must be one of auto, ")
    assert said.endswith(f", {'x' * 200}/config.json")
    assert str(InputError(said)) == said


def test_an_error_can_always_be_printed():
    said = str(InputError("date '\ud800' and \x1b[31m\x00, of\r\nthis £ file"))
    assert said == "date '\\ud800' and \\x1b[31m\\x00, of  this £ file"
    assert all(printable(chr(code)).isprintable() for code in range(0x11000))
    assert printable("Börse 東証 €") == "Börse 東証 €"
