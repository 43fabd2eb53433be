"""Verdicts on disk: whole or not there, whoever else writes, whatever the disk does."""

import dataclasses
import errno
import json
import multiprocessing
import os
from pathlib import Path

import pytest
from test_proof_key import GPU, SUBJECT

from fastflag import files
from fastflag.model.proof import verdicts as module
from fastflag.model.proof.key import Surroundings
from fastflag.model.proof.verdicts import Found, Verdict, Verdicts, forget, locked

VERDICT = Verdict(
    "swiglu",
    launched="torch",
    replayed="triton",
    reason="1.4 times as fast on the device",
    found={
        "torch": Found("right", "", 1.0, 3e-5, 1e-5),
        "triton": Found("right", "", 0.9, 2e-5, 2e-5),
        "flash-attn": Found("wrong", "output 0 is off by 3 in row 7", 900.0),
    },
    when="2026-11-29",
)


@pytest.fixture
def kept(tmp_path) -> Verdicts:
    return Verdicts(SUBJECT, Surroundings.of(GPU), tmp_path / "verdicts")


def test_a_verdict_is_read_as_it_was_kept(kept):
    assert kept.read("swiglu") is None
    assert kept.keep(VERDICT)
    assert kept.read("swiglu") == VERDICT
    assert kept.read("rms_norm") is None


def test_of_something_else_there_is_none(kept):
    kept.keep(VERDICT)
    other = dataclasses.replace(SUBJECT, lora_rank=16)
    assert Verdicts(other, kept.surroundings, kept.folder).read("swiglu") is None


def test_what_changed_is_told(kept):
    kept.keep(VERDICT)
    assert kept.stale("rms_norm") == ""
    for changes, told in (
        ({"driver": "999"}, "driver"),
        ({"kernels": "other", "triton": "9.9"}, "triton, kernels"),
        ({}, ""),
    ):
        surroundings = dataclasses.replace(kept.surroundings, **changes)
        assert Verdicts(SUBJECT, surroundings, kept.folder).stale("swiglu") == told
    # The nearest one of several.
    twice = dataclasses.replace(kept.surroundings, driver="999", cuda="99")
    Verdicts(SUBJECT, twice, kept.folder).keep(VERDICT)
    now = dataclasses.replace(twice, driver="998", torch="9")
    assert Verdicts(SUBJECT, now, kept.folder).stale("swiglu") == "driver, torch"
    # Of another model nothing is stale: it never was proved.
    assert Verdicts(dataclasses.replace(SUBJECT, heads=8), now, kept.folder).stale("swiglu") == ""


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"facts": {}}',
        '{"facts": {}, "verdict": {"op": "swiglu"}}',
        '{"facts": 3, "verdict": {}}',
        b"\xff\xfe\x00",
        '{"facts": {}, "verdict": {"op": "swiglu", "launched": 3, "replayed": "torch", '
        '"reason": "", "found": {}, "when": ""}}',
        '{"facts": {}, "verdict": {"op": "rms_norm", "launched": "triton", "replayed": "torch", '
        '"reason": "", "found": {}, "when": ""}}',
    ],
)
def test_a_damaged_file_is_no_verdict(kept, content, caplog):
    kept.keep(VERDICT)
    (path,) = kept.folder.glob("*.json")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert kept.read("swiglu") is None
    assert "not read" in caplog.text
    kept.stale("swiglu")
    assert kept.keep(VERDICT) and kept.read("swiglu") == VERDICT


def test_a_folder_in_the_place_of_a_file_is_no_verdict(kept, caplog):
    kept._path("swiglu").mkdir(parents=True)
    assert kept.read("swiglu") is None
    assert not kept.keep(VERDICT)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_is_told(kept, number, monkeypatch, caplog):
    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number))

    kept.keep(VERDICT)
    monkeypatch.setattr(files.os, "fsync", refuse)
    assert not kept.keep(dataclasses.replace(VERDICT, reason="another"))
    assert os.strerror(number) in caplog.text
    again = Verdicts(SUBJECT, kept.surroundings, kept.folder)
    assert again.read("swiglu") == VERDICT  # as it was
    assert kept.read("swiglu").reason == "another"  # for this process
    assert [path.suffix for path in kept.folder.iterdir()] == [".json"]


def test_a_file_where_the_folder_should_be(tmp_path, caplog):
    (tmp_path / "verdicts").write_text("")
    kept = Verdicts(SUBJECT, Surroundings.of(GPU), tmp_path / "verdicts")
    assert not kept.keep(VERDICT) and kept.read("swiglu") == VERDICT
    assert Verdicts(SUBJECT, kept.surroundings, kept.folder).read("swiglu") is None
    assert "not kept" in caplog.text
    with locked("00ff", pytest.fail, kept.folder):
        pass


def _write(folder: Path, number: int) -> None:
    kept = Verdicts(SUBJECT, Surroundings.of(GPU), folder)
    for _ in range(40):
        kept.keep(dataclasses.replace(VERDICT, reason=str(number) * 20_000))


def test_of_several_writers_one_verdict_is_whole(kept):
    processes = multiprocessing.get_context("fork")
    writers = [processes.Process(target=_write, args=(kept.folder, n)) for n in (1, 2)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        verdict = kept.read("swiglu")
        if verdict is not None:
            assert len({*verdict.reason}) == 1 and len(verdict.reason) == 20_000
            seen.add(verdict.reason[0])
    for writer in writers:
        writer.join()
    assert seen <= {"1", "2"} and len([*kept.folder.iterdir()]) == 1


def test_forgotten_verdicts_are_gone(kept):
    kept.keep(VERDICT)
    kept.keep(dataclasses.replace(VERDICT, op="rms_norm"))
    assert forget(kept.folder) == 2
    assert kept.read("swiglu") is None
    assert forget(kept.folder) == 0 == forget(kept.folder / "nowhere")


def test_one_at_a_time_on_a_gpu(tmp_path, monkeypatch):
    """flock is of the open file, so two handles of one process exclude each other as well."""
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.001)
    waited = []
    with locked("a", pytest.fail, tmp_path):
        with locked("b", pytest.fail, tmp_path):  # another GPU
            pass

        def waiting():
            waited.append(1)
            raise InterruptedError

        with pytest.raises(InterruptedError), locked("a", waiting, tmp_path):
            pytest.fail("two at a time")
    with locked("a", pytest.fail, tmp_path):
        assert waited == [1]


def test_the_file_says_what_it_holds_for(kept):
    kept.keep(VERDICT)
    (path,) = kept.folder.iterdir()
    facts = json.loads(path.read_text())["facts"]
    assert facts["driver"] == "580.65.06" and facts["dtype"] == "bf16"


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.update(when=None),
        lambda one: one["found"]["triton"].update(device="5us"),
        lambda one: one["found"]["triton"].update(error="x"),
        lambda one: one["found"]["triton"].update(outcome="wrong"),
    ],
    ids=["when", "a time", "an error", "taken and wrong"],
)
def test_a_verdict_of_another_form_is_none(kept, change):
    taken = dataclasses.replace(
        VERDICT, launched="triton", found={"triton": Found("right", "", 0.5, 1e-5, 1e-5)}
    )
    kept.keep(taken)
    assert kept.read(taken.op) == taken
    path = kept._path(taken.op)
    document = json.loads(path.read_text())
    change(document["verdict"])
    path.chmod(0o644)
    path.write_text(json.dumps(document))
    assert kept.read(taken.op) is None
