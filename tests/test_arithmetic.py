"""What dtype auto is: measured once, when a run begins, and the run's own from then on."""

import json
from itertools import repeat

import pytest
import torch
from models import EXACT
from small import small_config, small_market, write_csv

from fastflag import cli
from fastflag.config import PolicyConfig, to_dict
from fastflag.files import InputError
from fastflag.model import arithmetic
from fastflag.model.arithmetic import DTYPES, Speeds, measured, resolved
from fastflag.model.weights import open_weights
from fastflag.policy.table import Policy

CPU = torch.device("cpu")


def clock(monkeypatch, times):
    """Makes the measured products of a dtype take `times` of it, one after another."""
    names = {dtype: name for name, dtype in DTYPES.items()}

    class Timed:
        def frozen_linear(self, weight, bias, dtype):
            return lambda x: float(next(times[names[dtype]]))

    monkeypatch.setattr(arithmetic, "ops", Timed())
    monkeypatch.setattr(arithmetic, "_seconds", lambda device, work: work())


@pytest.fixture
def fast_in(monkeypatch):
    """Makes products of one dtype faster, by a clock of the test's own."""

    # The clock tells of the tiny model's products too.
    monkeypatch.setattr(arithmetic, "_TELLING", 0)

    def make(name: str) -> None:
        clock(monkeypatch, {dtype: repeat(1.0 if dtype == name else 2.0) for dtype in DTYPES})

    return make


def model_of(path):
    return open_weights(str(path)).config


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_auto_is_what_is_measured_to_be_fastest(tiny_model, fast_in, dtype):
    fast_in(dtype)
    made = resolved(PolicyConfig(dtype="auto", device="cpu"), model_of(tiny_model))
    assert made == PolicyConfig(dtype=dtype, device="cpu")


def test_a_named_dtype_is_not_measured(tiny_model, monkeypatch):
    monkeypatch.setattr(arithmetic, "measured", None)
    assert resolved(EXACT, model_of(tiny_model)) == EXACT


def test_the_least_of_several_rounds_counts(monkeypatch):
    """A slow moment of the machine must not decide: each dtype has one here."""
    clock(monkeypatch, {"bf16": iter([9, 2, 50, 2, 2]), "fp32": iter([70, 3, 3, 80, 3])})
    speeds = measured(CPU, 576, 1536)
    assert speeds == Speeds((256, 576, 1536), {"bf16": 2.0, "fp32": 3.0})
    assert speeds.best == "bf16"
    assert speeds.gigaflops("fp32") == pytest.approx(2 * 256 * 576 * 1536 / 3e9)


@pytest.mark.parametrize(
    ("bf16", "fp32", "best"), [(1.0, 1.2, "fp32"), (1.0, 1.3, "bf16"), (1.0, 0.5, "fp32")]
)
def test_bf16_is_taken_where_it_is_clearly_faster(bf16, fp32, best):
    assert Speeds((256, 576, 1536), {"bf16": bf16, "fp32": fp32}).best == best
    assert Speeds((256, 64, 128), {"bf16": bf16, "fp32": fp32}).best == "fp32"


def test_a_large_model_is_measured_on_a_part_of_its_shape():
    assert measured(CPU, 8192, 28672).shape == (256, 1024, 2048)


def test_a_run_keeps_the_dtype_it_began_with(tiny_model, tmp_path, fast_in, monkeypatch):
    bars = write_csv(small_market(), tmp_path / "bars.csv")
    given = small_config(tiny_model, data__data=f"csv:{bars}", policy__dtype="auto")
    (tmp_path / "c.json").write_text(json.dumps(to_dict(given)))
    run = tmp_path / "run"
    words = ["train", "--out", str(run), "--config", str(tmp_path / "c.json")]
    fast_in("bf16")
    cli.main(words)
    fast_in("fp32")
    made = []
    start = Policy.__init__

    def noted(self, weights, config, *arguments):
        made.append(config.dtype)
        start(self, weights, config, *arguments)

    monkeypatch.setattr(Policy, "__init__", noted)
    cli.main([*words, "--resume"])
    cli.main(["backtest", str(run)])
    cli.main(["decide", str(run), "--date", str(small_market().dates[20])])
    assert made == ["bf16"] * 3
    assert json.loads((run / "config.json").read_text())["policy"]["dtype"] == "bf16"


def test_doctor_shows_both_times(capsys, fast_in):
    fast_in("fp32")
    cli.main(["doctor", "--json"])
    told = json.loads(capsys.readouterr().out)["arithmetic"]
    assert told == {
        "product": "256 x 576 with 576 x 1536",
        "bf16": "2e+03 ms, 0 GFLOP/s",
        "fp32": "1e+03 ms, 0 GFLOP/s",
        "--dtype auto": "fp32",
    }


# torch.cuda.get_arch_list() of three wheels, as pytorch/pytorch#182250 has them, and of a build
# for one GPU.
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU128 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize(
    ("codes", "capability", "runs"),
    [
        (CU126, (7, 0), True),
        (CU128, (7, 0), False),
        (CU128, (8, 9), True),  # sm_86's code
        (CU128, (12, 1), True),  # sm_120's
        (CU126, (12, 0), False),
        ([*CU126, "compute_90"], (12, 0), True),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_100f"], (10, 3), True),
        (["sm_86"], (8, 0), False),
        ([], (7, 0), True),  # what says nothing is believed
    ],
)
def test_a_gpu_that_pytorch_has_no_code_for_is_told(monkeypatch, capsys, codes, capability, runs):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: codes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla")
    assert arithmetic.device_of("cpu") == CPU
    if runs:
        assert arithmetic.device_of("auto") == torch.device("cuda")
        return
    architecture = f"sm_{capability[0]}{capability[1]}"
    for name in ("auto", "cuda"):
        with pytest.raises(InputError, match=f"no code for this GPU, {architecture}, but for .*sm"):
            arithmetic.device_of(name)
    cli.main(["doctor", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["machine"]["device"].startswith("Tesla, CUDA")
    assert f"no code for this GPU, {architecture}" in told["machine"]["device"]
    assert told["arithmetic"]["product"] == "256 x 576 with 576 x 1536"  # a CPU's
