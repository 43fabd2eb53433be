"""What a training and `doctor` make of verdicts, on a machine that seems to have a GPU: when a
child is started, what is taken of what it found, and what a run keeps."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from precision import compute_as_on_a_gpu
from small import small_config, small_market, small_world
from tape import Tape
from test_proof_key import GPU
from test_proof_parent import CHILD

from fastflag.cli import main
from fastflag.config import TrainConfig
from fastflag.evaluate import doctor
from fastflag.files import InputError, read_json
from fastflag.learn import prove as module
from fastflag.learn import run as run_module
from fastflag.learn import whole_update
from fastflag.learn.prove import Proof, prove_for, seconds_ahead, with_implementations
from fastflag.learn.train import train
from fastflag.model import ops
from fastflag.model.ops import Choice
from fastflag.model.proof import gpu
from fastflag.model.proof.choice import GRAPHS, choices, parsed, to_prove, written
from fastflag.model.proof.devices import Cpu
from fastflag.model.proof.key import Subject
from fastflag.model.proof.layer import CHOSEN, LAYER, confirm, random_weights
from fastflag.model.proof.verdicts import Found, Verdict
from fastflag.model.weights import open_config, open_weights
from fastflag.policy.graphs import Graphs

CUDA = torch.device("cuda")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def nothing_settled(monkeypatch):
    monkeypatch.delenv("FASTFLAG_KERNELS", raising=False)
    monkeypatch.delenv("FASTFLAG_GRAPHS", raising=False)
    ops.settle({})
    yield
    ops.settle({})


@pytest.fixture
def with_gpu(monkeypatch, tmp_path):
    """A machine that seems to have an H100, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu, "first", lambda: GPU)
    monkeypatch.setattr(module, "device_of", lambda name: CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(ops, "unusable", lambda device: "")


@pytest.fixture
def children(monkeypatch):
    """The stand-in child in the place of the real one; how often it was started."""
    started = []
    code = CHILD.replace("MODE", "pass").replace("START", "").replace("BAD", "()")
    real = subprocess.Popen

    def start(words, **options):
        if tuple(words) == module.COMMAND:
            started.append(words)
        return real(words, **options)

    monkeypatch.setattr(module, "COMMAND", (sys.executable, "-c", code))
    monkeypatch.setattr(subprocess, "Popen", start)
    return started


def no_bar(text, done, total):
    pass


def config_of(model, steps=4, **changes) -> TrainConfig:
    config = small_config(model, policy__dtype="bf16", **changes)
    return dataclasses.replace(config, total_timesteps=24 * steps)


LONG = 10**9


def proof_of(model) -> Proof:
    proof = Proof.of(config_of(model).policy, open_config(str(model)))
    assert proof is not None
    return proof


def kept(model, op, launched="triton", replayed=None, reason="1.40 times as fast", **found):
    figures = {
        "torch": Found("right", "", 1.0, 2e-5, 1e-5),
        "triton": Found("right", "", 0.9, 1.4e-5, 1.2e-5),
    }
    verdict = Verdict(op, launched, replayed or launched, reason, figures | found, "2026-11-29")
    assert proof_of(model).verdicts.keep(verdict)


def test_on_a_cpu_no_child_is_started(tiny_model, tmp_path, monkeypatch):
    """Whatever GPU the driver tells of: the policy runs on a CPU here, or was told to."""
    monkeypatch.setattr(gpu, "first", lambda: GPU)
    monkeypatch.setattr(module.parent, "prove", lambda *_: pytest.fail("a child was started"))
    long = config_of(tiny_model, LONG)
    model = open_config(str(tiny_model))
    assert prove_for(long, model, 0, no_bar) is None
    on_cpu = dataclasses.replace(long, policy=dataclasses.replace(long.policy, device="cpu"))
    monkeypatch.setattr(module, "device_of", lambda name: CUDA)
    assert prove_for(on_cpu, model, 0, no_bar) is None
    monkeypatch.setattr(gpu, "first", lambda: None)  # another maker's GPU
    assert prove_for(long, model, 0, no_bar) is None


def test_a_long_run_proves_once(tiny_model, with_gpu, children):
    model = open_config(str(tiny_model))
    short = prove_for(config_of(tiny_model), model, 0, no_bar)
    assert short.missing == to_prove() and not children
    # As much work, and all of it done.
    long = config_of(tiny_model, LONG)
    prove_for(long, model, LONG - 3, no_bar)
    assert not children
    told = []
    proof = prove_for(long, model, 0, lambda *words: told.append(words))
    assert len(children) == 1 and not proof.missing
    assert ("swiglu triton", to_prove().index("swiglu"), len(to_prove())) in told
    again = prove_for(long, model, 0, no_bar)
    assert len(children) == 1 and not again.missing
    assert [again.verdicts.read(op) for op in to_prove()] == [
        proof.verdicts.read(op) for op in to_prove()
    ]


@pytest.mark.parametrize(
    ("variable", "value"), [("FASTFLAG_KERNELS", "torch"), ("FASTFLAG_KERNELS", "triton")]
)
def test_what_is_asked_for_is_not_proved(
    tiny_model, with_gpu, children, monkeypatch, variable, value
):
    monkeypatch.setenv(variable, value)
    assert prove_for(config_of(tiny_model, LONG), open_config(str(tiny_model)), 0, no_bar)
    named = config_of(tiny_model, LONG, policy__kernels="torch", policy__graphs="off")
    assert prove_for(named, open_config(str(tiny_model)), 0, no_bar) is None
    assert not children


def test_a_layer_and_graphs_are_proved_again_with_what_they_are_made_of(tiny_model, with_gpu):
    proof = proof_of(tiny_model)
    for op in to_prove():
        kept(tiny_model, op)
    assert proof.missing == ()
    for gone, missing in (("swiglu", ("swiglu", LAYER, GRAPHS)), (LAYER, (LAYER, GRAPHS))):
        proof.verdicts._path(gone).unlink()
        assert proof.missing == missing
        kept(tiny_model, gone)
    proof.verdicts._path(GRAPHS).unlink()
    assert proof.missing == (GRAPHS,)


def test_of_two_at_once_one_proves(tiny_model, with_gpu, children):
    """The one that waited for the lock reads what the other has found."""
    one, other = proof_of(tiny_model), proof_of(tiny_model)
    assert one.missing == other.missing == to_prove()
    one.run(no_bar)
    other.run(no_bar)
    assert len(children) == 1


def test_a_full_disk_is_told_and_the_run_has_its_verdicts(
    tiny_model, with_gpu, children, monkeypatch, caplog
):
    from fastflag import files

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    proof = prove_for(config_of(tiny_model, LONG), open_config(str(tiny_model)), 0, no_bar)
    assert "No space left on device" in caplog.text and not proof.missing
    monkeypatch.undo()


def test_a_child_that_can_not_begin_leaves_pytorch(tiny_model, with_gpu, children, caplog):
    module.COMMAND = (sys.executable, "-c", "import sys; sys.exit('no kernel image')")
    proof = prove_for(config_of(tiny_model, LONG), open_config(str(tiny_model)), 0, no_bar)
    assert proof.missing == to_prove() and "no kernel image" in caplog.text
    assert {one.implementation for one in choices(proof.verdicts).values()} == {"torch", "off"}


def test_what_is_taken(tiny_model, with_gpu):
    def taken(op="swiglu", **given):
        return choices(proof_of(tiny_model).verdicts, **given)[op]

    assert taken() == Choice("torch", "not proved: `fastflag doctor --prove` does it")
    kept(tiny_model, "swiglu")
    assert "a whole layer with it not proved" in taken().reason
    kept(tiny_model, LAYER, launched="torch", replayed=CHOSEN, reason="0.9 times as fast")
    assert taken().implementation == "torch" and "no faster with it: 0.9" in taken().reason
    assert taken(replayed=True).implementation == "triton"
    kept(tiny_model, LAYER, launched=CHOSEN)
    choice = taken()
    assert (choice.implementation, choice.reason) == ("triton", "1.40 times as fast")
    assert choice.evidence == (
        "torch 20 us, 10 us to launch, error 1 of PyTorch's; "
        "triton 14 us, 12 us to launch, error 0.9 of PyTorch's; 2026-11-29"
    )
    assert taken("rms_norm").implementation == "torch"
    # On the device alone it is faster: taken where graphs are.
    kept(tiny_model, "rotate", launched="torch", replayed="triton", reason="on the device")
    assert taken("rotate").implementation == "torch"
    kept(tiny_model, GRAPHS, launched="on")
    assert taken("rotate").implementation == "triton" and taken(GRAPHS).implementation == "on"
    assert taken("rotate", replayed=False).implementation == "torch"


def test_what_failed_is_shown(tiny_model, with_gpu):
    why = "64 rows: 3 of 200 replays have other bits, the first is 150"
    wrong = Found("wrong", why, 1.0)
    kept(tiny_model, "swiglu", launched="torch", reason="triton wrong", triton=wrong)
    told = doctor._ops(CUDA, config_of(tiny_model).policy)
    assert told["swiglu"]["implementation"] == "torch"
    assert told["swiglu"]["reason"] == "triton wrong"
    assert f"triton wrong ({why})" in told["swiglu"]["evidence"]


def test_doctor_tells_what_is_stale(tiny_model, with_gpu, monkeypatch):
    kept(tiny_model, "swiglu")
    newer = dataclasses.replace(GPU, driver="999")
    monkeypatch.setattr(gpu, "first", lambda: newer)
    told = doctor._ops(CUDA, config_of(tiny_model).policy)
    assert told["swiglu"]["reason"] == (
        "is proved of another driver: `fastflag doctor --prove` does it"
    )
    assert told["rms_norm"]["reason"].startswith("not proved")


def test_doctor_proves_shows_and_forgets(tiny_model, with_gpu, children, monkeypatch, capsys):
    words = ["doctor", "--prove", "--model", str(tiny_model), "--dtype", "bf16"]
    words += ["--top-layers", "1", "--lora-rank", "2", "--trunk-weights", "fp32"]
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)  # its own figures
    main([*words, "--json"])
    assert len(children) == 1
    assert json.loads(capsys.readouterr().out)["ops"]["swiglu"]["implementation"] == "torch"
    told = doctor._ops(CUDA, config_of(tiny_model).policy)
    assert told["swiglu"]["implementation"] == "torch"  # the child's layer says triton, not chosen
    main(["doctor", "--forget", "--json"])
    assert f"forgotten: {len(to_prove())} proofs" in capsys.readouterr().err
    assert proof_of(tiny_model).missing == to_prove()


def test_doctor_proves_nothing_on_a_cpu(monkeypatch, capsys, tiny_model):
    monkeypatch.setattr(gpu, "first", lambda: None)
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--prove", "--model", str(tiny_model)])
    assert stop.value.code == 2
    told = "fastflag: error: kernels prove themselves on an NVIDIA GPU, and there is none, --prove"
    assert capsys.readouterr().err.strip() == told


NAMES = [op.name for op in ops.OPS if "triton" in op.implementations]


@given(st.sets(st.sampled_from(NAMES)))
def test_what_is_written_is_read(names):
    chosen = {name: Choice("triton", "") for name in names}
    text = written(chosen)
    assert text == "torch" or text.startswith("triton:")
    read = parsed(text)
    assert {name for name, one in read.items() if one.implementation == "triton"} == names
    assert len(read) == len(ops.OPS) and written(read) == text


@pytest.mark.parametrize(
    "text", ["triton", "triton:", "triton:norm", "torch:swiglu,", "fast", "", "triton:linear"]
)
def test_what_is_not_so_written_is_refused(text):
    if not text:
        assert all(one.implementation == "torch" for one in parsed(text or "torch").values())
        return
    with pytest.raises(InputError, match="--kernels"):
        parsed(text)


def test_a_run_keeps_what_it_began_with(tiny_model, with_gpu, tmp_path, monkeypatch):
    """Whatever verdicts say later, and whatever is fastest on the machine that goes on."""
    kept(tiny_model, "swiglu")
    kept(tiny_model, LAYER, launched=CHOSEN)
    config = config_of(tiny_model)
    model = open_config(str(tiny_model))
    began = with_implementations(config, prove_for(config, model, 0, no_bar))
    assert (began.policy.kernels, began.policy.graphs) == ("triton:swiglu", "off")
    with run_module.claim(tmp_path / "run", began, resume=False):
        (tmp_path / "run" / "checkpoint").mkdir()
        (tmp_path / "run" / "checkpoint" / "state.json").write_text('{"step": 2}')
    assert run_module.updates_done(tmp_path / "run", resume=True) == 2
    kept(tiny_model, "swiglu", launched="torch", reason="none is faster")
    kept(tiny_model, "rms_norm")
    kept(tiny_model, GRAPHS, launched="on")
    again = run_module.as_it_began(config, tmp_path / "run", resume=True)
    again = with_implementations(again, prove_for(again, model, 2, no_bar))
    assert again == began
    run_module.check_claim(tmp_path / "run", again, resume=True)
    # A new run takes what holds now.
    fresh = with_implementations(config, prove_for(config, model, 0, no_bar))
    assert (fresh.policy.kernels, fresh.policy.graphs) == ("triton:rms_norm", "on")
    # With a budget nothing is replayed, and what is launched counts.
    bounded = config_of(tiny_model, policy__memory_budget=8)
    bounded = with_implementations(bounded, prove_for(bounded, model, 0, no_bar))
    assert (bounded.policy.kernels, bounded.policy.graphs) == ("triton:rms_norm", "off")
    # Named ones are taken, and kept from then on.
    other = dataclasses.replace(
        again, policy=dataclasses.replace(again.policy, kernels="torch", graphs="off")
    )
    with run_module.claim(tmp_path / "run", other, resume=True):
        pass
    assert run_module.read_config(tmp_path / "run").policy.kernels == "torch"


def test_a_policy_takes_the_runs_and_says_so_again(tiny_model, monkeypatch):
    config = config_of(tiny_model, policy__kernels="triton:swiglu", policy__graphs="off")
    _, policy, _ = small_world(config, small_market())
    assert ops.swiglu.choice(CUDA) == Choice("triton", "as the run began")
    assert ops.rms_norm.choice(CUDA).implementation == "torch"
    small_world(config_of(tiny_model, policy__kernels="torch"), small_market())
    assert ops.swiglu.choice(CUDA).implementation == "torch"
    with pytest.raises(AttributeError):  # of no prompts, but after it has said what it takes
        policy.evaluate(None)
    assert ops.swiglu.choice(CUDA).implementation == "triton"


def test_on_a_cpu_a_run_keeps_pytorchs(tiny_model, tmp_path):
    config = small_config(tiny_model)
    train(config, small_market(), open_weights(str(tiny_model)), tmp_path / "run", False)
    policy = read_json(tmp_path / "run" / "config.json")["policy"]
    assert (policy["kernels"], policy["graphs"]) == ("torch", "off")


def test_a_run_of_before_had_pytorchs(tmp_path):
    document = {"fastflag": "0.1.0", "policy": {"dtype": "bf16"}}
    (tmp_path / "config.json").write_text(json.dumps(document))
    policy = run_module.read_config(tmp_path).policy
    assert (policy.kernels, policy.graphs) == ("torch", "off")


def test_the_work_ahead_is_of_updates_and_layers(tiny_model):
    model = open_config(str(tiny_model))
    one = seconds_ahead(config_of(tiny_model, 10), model, 0)
    assert one == pytest.approx(10 * 198 * 5e-6)  # by launches: the model is tiny
    assert seconds_ahead(config_of(tiny_model, 10), model, 5) == pytest.approx(one / 2)
    twice = config_of(tiny_model, 10, algorithm__update_epochs=2)
    assert seconds_ahead(twice, model, 0) == pytest.approx(2 * one)
    wide = dataclasses.replace(model, width=8192, mlp_width=28672)
    assert seconds_ahead(config_of(tiny_model, 10), wide, 0) > 10 * one


SUBJECT = Subject(64, 96, 4, 2, 16, True, True, 3, "fp32", "nf4", "qlora", 4, 1)


def request_of(*verdicts, **changes):
    from test_proof_child import BATCH

    from fastflag.model.proof.child import Request

    subject = dataclasses.replace(SUBJECT, **changes)
    return Request(subject, (LAYER,), BATCH, "cpu", rounds=5, seconds=0.2, verdicts=verdicts)


@pytest.mark.parametrize("adaptation", ["lora", "qlora", "full"])
def test_a_whole_layer_confirms_what_is_chosen(adaptation, monkeypatch):
    """Beside PyTorch's SwiGLU made slow, and beside one made slow in the kernel's place."""
    import time

    fast, chosen = ops.swiglu._torchs, Verdict("swiglu", "triton", "torch", "")

    def slow(*arguments):
        time.sleep(0.05)
        return fast(*arguments)

    told = []
    for torchs, triton, taken in ((slow, fast, CHOSEN), (fast, slow, "torch")):
        monkeypatch.setattr(ops.swiglu, "_torchs", torchs)
        monkeypatch.setattr(ops.swiglu, "_triton", triton)
        verdict = confirm(request_of(chosen, adaptation=adaptation), Cpu(), told.append)
        assert (verdict.launched, verdict.replayed) == (taken, "torch")
    assert "swiglu" not in {op.name for op in ops.OPS if op._chosen}
    assert told[0] == {"begin": LAYER, "implementation": CHOSEN, "case": "launched"}


def test_where_nothing_is_chosen_there_is_no_layer():
    verdict = confirm(request_of(Verdict("swiglu", "torch", "torch", "")), Cpu(), pytest.fail)
    assert verdict.launched == verdict.replayed == "torch"


def test_random_weights_are_a_model():
    weights = random_weights(SUBJECT, 2, 32)
    assert weights.tensor("model.layers.1.mlp.down_proj.weight").shape == (64, 96)
    assert weights.fingerprint == random_weights(SUBJECT, 2, 32).fingerprint


def test_graphs_are_judged_on_a_whole_update(monkeypatch):
    """On a CPU nothing is replayed, and an update is as long with as without."""
    request = request_of(qk_norm=False, attention_bias=False, adaptation="lora")
    told = []
    verdict = whole_update.prove_graphs(request, Cpu(), told.append)
    assert verdict.op == GRAPHS and verdict.found["on"].device > 0
    assert {one["implementation"] for one in told} == {"off", "on"}


def test_graphs_that_replay_another_gradient_are_refused(monkeypatch):
    real = whole_update._update

    def doubled(request, policy):
        one = real(request, policy)
        factor = 2.0 if policy.config.graphs == "on" else 1.0
        return lambda: {"grad_norm": factor * float(one()["grad_norm"])}

    monkeypatch.setattr(whole_update, "_update", doubled)
    request = request_of(qk_norm=False, attention_bias=False, adaptation="lora")
    verdict = whole_update.prove_graphs(request, Cpu(), lambda _: None)
    assert verdict.launched == "off" and verdict.found["on"].outcome == "wrong"


def with_graphs(monkeypatch, capture):
    """From now on a policy that is judged computes as on a GPU and, on, replays by `capture`; the
    optimisers that are made."""
    compute_as_on_a_gpu(monkeypatch)
    real, make, made = whole_update._policy, whole_update.make_optimizer, []

    def policy_of(request, device, way):
        policy = real(request, device, way)
        modules = torch.nn.ModuleList([*policy.top, policy.action_head, policy.value_head])
        policy.graphs = Graphs(policy._evaluate_stage, modules, capture if way == "on" else None)
        return policy

    def fused(*arguments):
        groups = [
            group | {"fused": True, "lr": torch.tensor(group["lr"])}
            for group in make(*arguments).param_groups
        ]
        made.append(torch.optim.AdamW(groups, eps=1e-5, fused=True))
        return made[-1]

    monkeypatch.setattr(whole_update, "_policy", policy_of)
    monkeypatch.setattr(whole_update, "make_optimizer", fused)
    return made


def judged():
    request = request_of(qk_norm=False, attention_bias=False, adaptation="lora")
    return whole_update.prove_graphs(request, Cpu(), lambda _: None), request


def test_graphs_whose_capture_fails_are_told(monkeypatch):
    """Their updates are launched, and would be timed as graphs that are no faster."""

    def failing(work):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    with_graphs(monkeypatch, failing)
    verdict, _ = judged()
    found = verdict.found["on"]
    assert (verdict.launched, found.outcome) == ("off", "failed")
    assert found.why.startswith("a capture fails: CUDA error: operation not permitted")


def test_what_is_judged_is_replayed_whole(monkeypatch):
    """From the second update on: the evaluation, and all that follows, the optimiser's step too."""
    tape = Tape()
    optimisers = with_graphs(monkeypatch, tape)
    step, steps = torch.optim.AdamW.step, []

    def counted(optimizer):
        steps.append(optimisers.index(optimizer))
        return step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    verdict, request = judged()
    updates = whole_update._WARM_UP + request.rounds
    assert verdict.found["on"].outcome == "right" and not verdict.found["on"].why
    assert tape.captured == 2 and tape.replays == [1, 2] * (updates - 1)
    # Python steps a replayed optimiser in the first update, and while the second is captured.
    assert [steps.count(number) for number in (0, 1)] == [updates, 2]


def test_steps_that_a_replay_leaves_out_are_told(monkeypatch):
    """The gradient's norm says little of them."""
    monkeypatch.setattr(whole_update, "_BOUND", 1.0)
    with_graphs(monkeypatch, Tape())
    monkeypatch.setattr("fastflag.learn.step.take_step", lambda *_: None)
    verdict, _ = judged()
    found = verdict.found["on"]
    assert found.outcome == "wrong" and found.why.startswith("the parameters move by")


def test_the_child_is_a_program():
    """The real one, on a CPU, asked for one op: lines of ours alone come on stdout."""
    from test_proof_child import BATCH

    from fastflag.model.proof.child import Request
    from fastflag.model.proof.parent import prove

    request = Request(SUBJECT, ("action_terms",), BATCH, "cpu", replays=2, rounds=5, seconds=0.1)
    told = [*prove(module.COMMAND, request, silence=120.0)]
    assert isinstance(told[-1], Verdict) and told[-1].found["torch"].outcome == "right"
    assert told[-1].launched == "torch"


def test_a_cpu_opens_a_run_that_took_what_is_not_here(tiny_model):
    """Such as flash-attn, on the GPU where it was trained."""
    there = "another:causal_attention,swiglu"
    with pytest.raises(InputError, match="no 'another' implementation of 'causal_attention' here"):
        parsed(there)
    config, named = (config_of(tiny_model, policy__kernels=kernels) for kernels in ("torch", there))
    tables = []
    for each in (config, named):
        world, policy, days = small_world(each, small_market())
        tables.append(policy.evaluate(world.centring_prompts([*days])))
    assert torch.equal(tables[0].log_probabilities, tables[1].log_probabilities)
    with pytest.raises(InputError, match="implementation of 'swigloo'"):
        parsed("another:swigloo", there=False)
