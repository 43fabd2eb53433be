"""A child that crashes, hangs, talks garbage or dies half-way harms nobody, and each ends as it
should: what it had found stays, what ended it is named, and the others are proved by the next."""

import os
import signal
import sys
import time

import pytest
from test_proof_key import SUBJECT

from fastflag.model.proof.child import Request
from fastflag.model.proof.parent import Begun, GivenUp, prove
from fastflag.model.proof.verdicts import Found, Verdict

# Speaks as the child does, without torch, and does what `MODE` says where triton's swiglu comes.
CHILD = """
import json, os, signal, sys, time
request = json.loads(sys.stdin.readline())
def tell(**document):
    print(json.dumps(document), flush=True)
def verdict(op, implementation="triton"):
    tell(verdict=dict(op=op, launched=implementation, replayed=implementation, reason="faster",
                      found=request["failed"].get(op, {}), when="2026-11-29"))
def trouble():
    MODE
START
for op in request["ops"]:
    failed = request["failed"].get(op, {})
    tell(begin=op, implementation="torch", case="1 rows")
    if "triton" not in failed:
        tell(begin=op, implementation="triton", case="1 rows")
        if op in BAD:
            trouble()
    verdict(op, "torch" if "triton" in failed else "triton")
"""
OPS = ("rms_norm", "swiglu", "rotate")


def told_by(mode, bad=("swiglu",), start="", silence=20.0, ops=OPS):
    """(verdicts by op, what was given up) of a child of that mode."""
    code = CHILD.replace("MODE", mode).replace("START", start).replace("BAD", repr(bad))
    told = [*prove([sys.executable, "-c", code], Request(SUBJECT, ops), silence)]
    verdicts = {one.op: one for one in told if isinstance(one, Verdict)}
    return verdicts, [one for one in told if isinstance(one, GivenUp)]


def test_a_child_that_works():
    verdicts, given_up = told_by("pass")
    assert [*verdicts] == [*OPS] and not given_up
    assert all(one.launched == "triton" for one in verdicts.values())


def test_what_it_does_is_told_as_it_does_it():
    code = CHILD.replace("MODE", "pass").replace("START", "").replace("BAD", "()")
    told = prove([sys.executable, "-c", code], Request(SUBJECT, ("swiglu",)), 20.0)
    assert [next(told), next(told)] == [
        Begun("swiglu", "torch", "1 rows"),
        Begun("swiglu", "triton", "1 rows"),
    ]


@pytest.mark.parametrize(
    ("mode", "outcome", "why"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "faulted", "died by SIGSEGV"),
        ("os._exit(3)", "faulted", "died with status 3"),
        ("sys.exit('CUDA error: an illegal memory access')", "faulted", "illegal memory access"),
        ("os._exit(0)", "faulted", "ended without a verdict"),
        ('os.write(1, b\'{"verdict": {"op": "swig\'); os._exit(1)', "faulted", "status 1"),
        ("time.sleep(600)", "silent", "said nothing for 2 s"),
        (
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    time.sleep(600)",
            "silent",
            "said nothing",
        ),
        (
            "while True: print('still here', flush=True); time.sleep(0.05)",
            "silent",
            "said nothing",
        ),
    ],
    ids=["segfault", "status", "words", "exit 0", "half a line", "hang", "deaf", "only garbage"],
)
def test_what_ends_a_child_is_left_out_next_time(mode, outcome, why):
    verdicts, given_up = told_by(mode, silence=2.0)
    assert not given_up and {*verdicts} == {*OPS}
    assert verdicts["rms_norm"].launched == verdicts["rotate"].launched == "triton"
    assert verdicts["swiglu"].launched == "torch"
    found = verdicts["swiglu"].found["triton"]
    assert found.outcome == outcome and why in found.why and "1 rows" in found.why


@pytest.mark.parametrize(
    "garbage",
    [
        "print('Loading...')",
        "sys.stdout.buffer.write(bytes(range(256)) + b'\\n')",
        "print('[1, 2]'); print('null'); print('{}'); print('3'); print('{\"begin\": 3}')",
        'print(\'{"verdict": {}}\'); print(\'{"verdict": {"found": {}}}\')',
        "print('{\"verdict\": 1}'); print('{\"verdict\": null}')",
        "print('[' * 100_000)",
        "print('x' * 1_000_000)",
        "verdict('no_such_op'); tell(begin='no_such_op')",
        "sys.stderr.write('warning ' * 100_000)",
    ],
)
def test_words_of_no_meaning_are_none(garbage):
    verdicts, given_up = told_by(garbage, start=garbage)
    assert [*verdicts] == [*OPS] and not given_up


def test_the_first_verdict_of_an_op_stays():
    verdicts, _ = told_by("verdict('rms_norm', 'torch')")
    assert verdicts["rms_norm"].launched == "triton"


def test_who_goes_on_speaking_does_not_hang():
    """2.4 seconds in all, a line every 0.4, where 1.2 seconds of silence end it."""
    line = "tell(begin='swiglu', implementation='triton', case='1 rows')"
    verdicts, _ = told_by(f"for _ in range(6): {line}; time.sleep(0.4)", silence=1.2)
    assert verdicts["swiglu"].launched == "triton"


def test_three_deaths_end_it():
    ops = ("rms_norm", "swiglu", "rotate", "lora_linear", "action_terms")
    verdicts, given_up = told_by("os._exit(9)", bad=ops, ops=ops)
    assert [*verdicts] == ["rms_norm", "swiglu", "rotate"]
    assert all(one.launched == "torch" for one in verdicts.values())
    assert verdicts["rotate"].reason == "triton faulted"
    (rest,) = given_up
    assert rest.ops == ("lora_linear", "action_terms") and "3 children died" in rest.why


def test_a_child_that_never_begins_is_not_begun_again(tmp_path):
    start = f"open({str(tmp_path / 'started')!r}, 'a').write('x'); sys.exit('no kernel image')"
    verdicts, given_up = told_by("pass", start=start)
    assert not verdicts
    assert given_up == [GivenUp(OPS, "the child died: no kernel image")]
    assert (tmp_path / "started").read_text() == "x"


def test_pytorchs_own_fault_condemns_no_kernel():
    mode = "tell(begin='swiglu', implementation='torch'); os._exit(1)"
    verdicts, given_up = told_by(mode)
    assert {*verdicts} == {"rms_norm", "rotate"}
    assert given_up == [GivenUp(("swiglu",), "the child died with status 1 in PyTorch's own part")]


def test_what_is_not_there_is_not_begun_again():
    with pytest.raises(FileNotFoundError):
        next(prove(["/no/such/python"], Request(SUBJECT, OPS), 1.0))


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:  # a zombie nobody has waited for is not alive
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize("end", ["closed", "silence"])
def test_nothing_of_a_child_is_left(tmp_path, end):
    """Not of what it has started either, such as a compiler; and Ctrl-C is heard as before."""
    before = signal.getsignal(signal.SIGINT)
    note = tmp_path / "pid"
    mode = (
        f"import subprocess; p = subprocess.Popen(['sleep', '600']); "
        f"open({str(note)!r}, 'a').write(f'{{os.getpid()}} {{p.pid}} '); time.sleep(600)"
    )
    code = CHILD.replace("MODE", mode).replace("START", "").replace("BAD", "('swiglu',)")
    told = prove([sys.executable, "-c", code], Request(SUBJECT, ("swiglu",)), 2.0)
    assert isinstance(next(told), Begun)
    while not note.exists() or len(note.read_text().split()) < 2:
        time.sleep(0.01)
    if end == "closed":
        told.close()
    else:
        assert len([*told]) == 3  # what it did, and again, and the verdict
    deadline = time.monotonic() + 5
    pids = [int(pid) for pid in note.read_text().split()]
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(_alive, pids))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_child_hears_no_wish_of_the_environment(monkeypatch):
    """With FASTFLAG_GRAPHS=on both ways of an update would be replayed."""
    for name in ("FASTFLAG_KERNELS", "FASTFLAG_GRAPHS"):
        monkeypatch.setenv(name, "triton" if name.endswith("KERNELS") else "on")
    start = "assert not {'FASTFLAG_KERNELS', 'FASTFLAG_GRAPHS'} & {*os.environ}"
    monkeypatch.setenv("HEARD", "1")
    verdicts, given_up = told_by("pass", start=f"{start}; assert os.environ['HEARD'] == '1'")
    assert [*verdicts] == [*OPS] and not given_up


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no PYTHONSAFEPATH")
def test_a_child_is_of_this_package_wherever_it_is_started(tmp_path, monkeypatch):
    (tmp_path / "fastflag").mkdir()
    (tmp_path / "fastflag" / "__init__.py").write_text("raise SystemExit('of another checkout')")
    monkeypatch.chdir(tmp_path)
    verdicts, given_up = told_by("pass", start="import fastflag")
    assert [*verdicts] == [*OPS] and not given_up


def test_a_request_is_read_as_it_was_written():
    verdict = Verdict("rms_norm", "triton", "triton", "faster", {"torch": Found("right")})
    request = Request(
        SUBJECT,
        OPS,
        failed={"swiglu": {"triton": Found("faulted", "SIGSEGV")}},
        verdicts=(verdict,),
    )
    assert Request.from_json(request.to_json()) == request
