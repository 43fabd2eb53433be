"""The benchmark scripts of kernels: their arithmetic, and what they refuse."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton exists for Linux only")

from precision import DEVICE

from bench import kernels
from bench.kernels import Bench, rows_of, run_tests
from bench.measure import results
from bench.measure.cases import CASES, SMALL_CASES, Case, Memory, tensors
from bench.measure.roofline import Cost, Roof, cost_of
from bench.measure.trial import Judge, Trial, whole
from bench.rivals import attention
from bench.rivals.ops import Absent, Provider, providers
from fastflag.kernels.rmsnorm import rms_norm, rms_norm_reference
from fastflag.model.exactness import missed, whole_numbers
from fastflag.model.proof.clock import DeviceClock, Sample, Times, WallClock, interleaved

pytestmark = pytest.mark.usefixtures("one_thread")
ROOF = Roof(bandwidth=1e9, rate=1e12)


def times(*microseconds: float, **sample) -> Times:
    return Times(tuple(Sample(1e-6 * value, **sample) for value in microseconds))


def norm_case(op=rms_norm) -> Case:
    (case,) = (case for case in SMALL_CASES if case.name == "rms_norm")
    return replace(case, op=op, inputs=lambda memory: case.inputs(memory) | {"epsilon": 1e-5})


def test_percentiles_lie_between_samples():
    some = times(50, 10, 40, 20, 30)
    # Of 5 sorted values, percent p is value 4 p / 100: 20% is 0.8 of the way from 10 to 20.
    assert [1e6 * some.percentile(p) for p in (20, 50, 80)] == pytest.approx([18, 30, 42])


def test_a_ratio_is_of_the_same_rounds():
    # The machine is 10 times slower in the last two rounds; quotients of medians would say 10.
    ours, theirs = times(1, 1, 10, 10, 10), times(2, 2, 2, 20, 20)
    assert ours.faster_than(theirs) == pytest.approx(2)


def test_a_rows_figures_by_hand():
    cost = Cost(operations=3e6, bytes=2_000)
    took = {
        "triton": times(1, 2, 3, launch=4e-5, peak=10**6),
        "reference": times(8, 8, 8, launch=5e-5, peak=3 * 10**6),
        "compile": times(3, 6, 9, launch=6e-5, peak=0),
    }
    rows = {
        row.provider: row for row in rows_of("op", "S", took, dict.fromkeys(took, ""), cost, ROOF)
    }
    ours = rows["triton"]
    assert (ours.value, ours.unit, ours.against) == (pytest.approx(2), "us", "compile")
    assert ours.ratio == pytest.approx(3)
    assert (rows["compile"].against, rows["compile"].ratio) == ("triton", pytest.approx(1 / 3))
    assert (ours.launch, ours.peak_mb) == (pytest.approx(40), 1.0)
    assert ours.gb_per_s == pytest.approx(1.0)  # 2,000 bytes in 2 us
    assert ours.tflop_per_s == pytest.approx(1.5)  # 3 Mflop in 2 us
    # 3 us of operations at 1 Tflop/s bind, 2 us of bytes at 1 GB/s don't.
    assert ours.roofline == pytest.approx(1.5)
    (alone,) = rows_of("op", "S", {"triton": took["triton"]}, {"triton": ""}, Cost(0, 2e3), ROOF)
    assert (alone.ratio, alone.against, alone.tflop_per_s) == (None, "", None)
    assert alone.roofline == pytest.approx(1.0)


def test_an_elementwise_op_costs_its_bytes():
    case = norm_case()
    inputs = case.inputs(Memory("cpu"))
    outputs = tensors(case.reference(**inputs))
    rows, columns = inputs["x"].shape
    # The stream is fp32, the norm bf16.
    stream, normed, weight = 4 * rows * columns, 2 * rows * columns, 2 * columns
    assert cost_of(case, inputs, outputs, False) == Cost(0, stream + normed + weight)
    # Backward reads x, the weight and dy, and writes dx.
    both = 3 * stream + 2 * normed + 2 * weight
    assert cost_of(case, inputs, outputs, True) == Cost(0, both)


def named(name: str, *trained: str) -> Case:
    def op():
        pass

    op.__name__ = name
    return Case(op, "by hand", lambda memory: {}, trained)


def test_operations_of_products_by_hand():
    rows, inner, out, rank = 5, 7, 11, 2
    lora = {
        "x": torch.zeros(rows, inner),
        "weight": torch.zeros(out, inner),
        "absmax": None,
        "a": torch.zeros(rank, inner),
        "b": torch.zeros(out, rank),
        "scale": 2.0,
    }
    case, y = named("lora_linear", "x", "a", "b"), [torch.zeros(rows, out)]
    forward = 2 * rows * (inner * out + rank * inner + rank * out)
    assert cost_of(case, lora, y, False).operations == forward
    backward = 2 * rows * (out * inner + 2 * rank * inner + 2 * rank * out)
    assert cost_of(case, lora, y, True).operations == forward + backward
    head = {
        "hidden": torch.zeros(rows, inner),
        "weight": torch.zeros(out, inner),
        "token": torch.zeros(rows, dtype=torch.int64),
        "allowed": torch.arange(3),
    }
    case = named("token_log_probability", "hidden")
    outputs = [torch.zeros(rows), torch.zeros(rows)]
    assert cost_of(case, head, outputs, True).operations == 2 * 2 * rows * inner * 3
    nf4 = {"x": torch.zeros(rows, inner), "outputs": out}
    for trained, products in (((), 1), (("x",), 2)):
        cost = cost_of(named("nf4_linear", *trained), nf4, y, True)
        assert cost.operations == products * 2 * rows * inner * out
    both = named("token_log_probability", "hidden", "weight")
    assert cost_of(both, head, outputs, True).operations == 3 * 2 * rows * inner * 3
    # hidden, three rows of the weight, token, allowed and both outputs.
    read = 4 * (rows * inner + 3 * inner) + 8 * (rows + 3)
    assert cost_of(case, head, outputs, False).bytes == read + 4 * 2 * rows


def attention_inputs(queries: int, first: list[int]) -> dict[str, Tensor]:
    """Two days of 5 and 3 keys, with 1 and 2 suffixes of 4 tokens."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "query": normal(3, 6, queries, 8),
        "key": normal(2, 2, 5, 8),
        "value": normal(2, 2, 5, 8),
        "lengths": torch.tensor([5, 3], dtype=torch.int32),
        "starts": torch.tensor([0, 1, 3], dtype=torch.int32),
        "own_key": normal(3, 2, 4, 8),
        "own_value": normal(3, 2, 4, 8),
        "first": torch.tensor(first, dtype=torch.int32),
    }


def attended(inputs: dict[str, Tensor], suffix: int, query: int, head: int) -> tuple[Tensor, int]:
    """One query's output, and how many keys it sees."""
    day, group = (0, 1, 1)[suffix], head // 3
    length, seen = int(inputs["lengths"][day]), int(inputs["first"][suffix]) + query + 1
    keys, values = (
        torch.cat((inputs[name][day, group, :length], inputs[f"own_{name}"][suffix, group, :seen]))
        for name in ("key", "value")
    )
    weights = (keys @ inputs["query"][suffix, head, query] / math.sqrt(8)).softmax(0)
    return weights @ values, len(keys)


@pytest.mark.parametrize(
    ("queries", "first"),
    [(4, [0, 0, 0]), (1, [3, 1, 2]), (2, [0, 2, 0])],
    ids=["all tokens", "last tokens", "pieces"],
)
def test_attention_baselines_see_what_each_query_may(queries, first, monkeypatch):
    inputs = attention_inputs(queries, first)
    count, heads, queries, _ = inputs["query"].shape
    places = [(u, i, h) for u in range(count) for i in range(queries) for h in range(heads)]
    truth = torch.empty_like(inputs["query"])
    pairs = 0
    for suffix, query, head in places:
        truth[suffix, head, query], seen = attended(inputs, suffix, query, head)
        pairs += seen
    monkeypatch.setattr("bench.rivals.ops.symbol", lambda module, name: packed_attention)
    case = named("prefix_attention", "query")
    made = {
        one.name: one.make(case, inputs) for one in providers(named("prefix_attention"), False)[2:]
    }
    assert {"torch sdpa", "packed", "flash-attn"} == {*made}
    assert made.pop("packed") is None  # on a CPU there is no flash attention to be timed
    made["packed"] = attention.packed_by_prefix(inputs)
    for function in made.values():
        torch.testing.assert_close(function(**inputs), truth)
    # A product of 8 numbers each for scores and for values.
    assert cost_of(case, inputs, [truth], False).operations == 2 * 2 * 8 * pairs


def packed_attention(query, key, value, starts, offsets, queries, longest, causal):
    """flash_attn_varlen_func's semantics: queries at the end of their keys."""
    made = []
    for one in range(len(starts) - 1):
        q, (k, v) = (
            query[starts[one] : starts[one + 1]],
            (
                side[offsets[one] : offsets[one + 1]].repeat_interleave(query.shape[1] // 2, 1)
                for side in (key, value)
            ),
        )
        scores = torch.einsum("qhe,khe->hqk", q, k) / math.sqrt(q.shape[-1])
        visible = torch.ones(scores.shape[1:], dtype=torch.bool).tril(len(k) - len(q))
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        made.append(torch.einsum("hqk,khe->qhe", weights, v))
    assert causal and queries == len(q) and longest == int(offsets.diff().max())
    return torch.cat(made)


def adapter(case: Case, name: str, inputs: dict):
    (one,) = (one for one in providers(case, False) if one.name == name)
    return one.make(case, inputs)


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_reads_the_ops_arguments(nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(48, 128)
    packed, state = functional.quantize_4bit(
        weight, quant_type="nf4", blocksize=64, compress_statistics=nested
    )
    right = functional.dequantize_4bit(packed, state)
    of_nested = {}
    if nested:
        inner = {"nested_code": state.state2.code, "nested_absmax": state.state2.absmax}
        of_nested = inner | {"offset": state.offset}
    inputs = {
        "packed": packed.flatten(),
        "absmax": state.absmax,
        "shape": [48, 128],
        "dtype": torch.float32,
        **of_nested,
    }
    made = adapter(named("nf4_dequantise"), "bitsandbytes", inputs)(**inputs)
    assert torch.equal(made, right)
    if nested:
        return
    x, a, b = torch.randn(5, 128), torch.randn(2, 128), torch.randn(48, 2)
    linear = {"x": x, "packed": packed.flatten(), "absmax": state.absmax, "outputs": 48}
    made = adapter(named("nf4_linear"), "bitsandbytes", linear)(**linear)
    torch.testing.assert_close(made, x @ right.T, rtol=1e-5, atol=1e-4)
    lora = {
        "x": x,
        "weight": packed.flatten(),
        "absmax": state.absmax,
        "a": a,
        "b": b,
        "scale": 2.0,
    }
    exact = x @ right.T + 2 * (x @ a.T) @ b.T
    case = named("lora_linear", "x", "a", "b")
    made = adapter(case, "bitsandbytes + peft", lora)(**lora)
    torch.testing.assert_close(made, exact, rtol=1e-5, atol=1e-4)
    plain = lora | {"weight": right, "absmax": None}
    made = adapter(case, "torch + peft", plain)(**plain)
    torch.testing.assert_close(made, exact, rtol=1e-5, atol=1e-4)
    assert adapter(case, "torch + peft", lora) is None
    assert adapter(case, "bitsandbytes + peft", plain) is None


@pytest.mark.parametrize("allowed", [None, torch.tensor([7, 2, 4])])
def test_heads_of_torch_know_temperature_and_allowed_tokens(allowed):
    hidden, weight, token = torch.randn(6, 5), torch.randn(9, 5), torch.tensor([2, 4, 7, 7, 2, 4])
    inputs = {"hidden": hidden, "weight": weight, "token": token, "temperature": 0.5}
    inputs["allowed"] = allowed
    logits = hidden @ weight.T / 0.5
    if allowed is not None:
        outside = [v for v in range(9) if v not in allowed]
        logits[:, outside] = -torch.inf
    law = torch.distributions.Categorical(logits=logits)
    case = named("token_log_probability", "hidden")
    log_probability, entropy = adapter(case, "torch logsumexp", inputs)(**inputs)
    torch.testing.assert_close(log_probability, law.log_prob(token))
    torch.testing.assert_close(entropy, law.entropy())
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return
    alone = adapter(case, "torch linear_cross_entropy", inputs)
    if allowed is not None:
        assert alone is None
        return
    torch.testing.assert_close(alone(**inputs), law.log_prob(token))


def in_place(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Right, but its argument is gone."""
    made = rms_norm_reference(x.clone(), weight, epsilon)
    x.mul_(0)
    return made


def slightly_wrong(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return 1.05 * rms_norm_reference(x, weight, epsilon)


def with_wrong_gradient(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return rms_norm_reference(x.detach() + 0.1 * (x - x.detach()), weight, epsilon)


def with_one_wrong_row(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """By a twentieth, one of the rows of 24,576: of the whole tensor that is 3e-4."""
    made = rms_norm_reference(x, weight, epsilon)
    wrong = torch.arange(len(made)) == 17
    return torch.where(wrong[:, None], 1.05 * made, made)


def undefined(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return rms_norm_reference(x, weight, epsilon) * torch.nan


def failing(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    raise RuntimeError("no such kernel\nfor this device")


def of_shape(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return rms_norm_reference(x, weight, epsilon)[:1]


def bench_of(*functions, tested=lambda name: "", **options) -> Bench:
    def offered(case, launch):
        right = Provider("reference", lambda case, inputs: case.reference)
        return [right, *(Provider(f.__name__, lambda *_, f=f: f) for f in functions)]

    return Bench(WallClock(), ROOF, 2, 0.0, tested=tested, offered=offered, **options)


@pytest.mark.parametrize(
    ("function", "refused"),
    [
        (in_place, []),
        (slightly_wrong, ["output 0 is off by 0.05", "output 0 is off by 0.05"]),
        (with_wrong_gradient, ["gradient of x is off by 0.9"]),
        (with_one_wrong_row, ["in row 17,", "in row 17,"]),
        (undefined, ["output 0 is off by nan", "output 0 is off by nan"]),
        (of_shape, ["output 0 is [1, 64], not", "RuntimeError: Mismatch in shape"]),
        (failing, ["RuntimeError: no such kernel for this device"] * 2),
    ],
)
def test_what_is_wrong_is_not_timed(function, refused, capsys):
    bench = bench_of(function)
    rows = list(bench.rows([norm_case()]))
    timed = [row.what for row in rows if row.provider == function.__name__]
    assert len(timed) == 2 - len(refused) and len(rows) == 2 + len(timed)
    assert all(told in line for told, line in zip(refused, bench.refused, strict=True))
    assert capsys.readouterr().err.splitlines() == [f"refused: {line}" for line in bench.refused]
    if "gradient" in "".join(refused):
        assert timed == ["rms_norm forward"]


class OverwritingItsGradient(torch.autograd.Function):
    """As Liger's RMSNorm, which writes dx where dy was."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return dy.mul_(2)


def test_a_gradient_that_is_overwritten_is_not_the_next_ones():
    case = replace(norm_case(), inputs=lambda memory: {"x": memory.normal(3, 5)})
    inputs = case.inputs(Memory("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Case, "reference", property(lambda self: lambda x: 2 * x))
        trial = Trial(case, inputs, [2 * inputs["x"]])
        judge = Judge(trial)
        for _ in range(2):
            assert judge.wrong(lambda x: OverwritingItsGradient.apply(x)) == ""
        first, second = (trial.maker(OverwritingItsGradient.apply)()()[1] for _ in range(2))
    assert torch.equal(first, second)


def test_a_part_of_the_outputs_is_compared_with_that_part():
    def two(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        return rms_norm_reference(x, weight, epsilon), 3 * x

    case = norm_case()
    inputs = case.inputs(Memory("cpu"))
    outputs = list(two(**inputs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Case, "reference", property(lambda self: two))
        judge = Judge(Trial(case, inputs, outputs))
        assert judge.wrong(rms_norm_reference) == ""
        assert "gradient of x" in judge.wrong(with_wrong_gradient)


# Those of which nearly all numbers, forward and backward, are sums of whole ones.
EXACT = ("nf4_dequantise", "nf4_linear", "lora_linear", "rotate_", "prefix_attention")


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: f"{case.name} {case.shape}")
def test_a_wrong_number_among_whole_ones_is_seen(case):
    """In each output and gradient of products and what is like them; the right ones are not."""
    torch.manual_seed(0)
    memory = Memory("cpu", rows=256)
    backward = bool(case.trained)
    trial = Trial.of(case, memory, backward)
    judge = Judge(trial, Trial.of(case, whole(memory), backward))
    assert judge.wrong(case.reference, to_the_bit=case.name != "lora_linear") == ""
    if case.name not in EXACT:
        return
    right = judge.whole.exact().maker(case.reference)()()
    for truth in right:
        made = truth.to(torch.bfloat16)
        assert missed(made, truth) == ""
        counted = int(whole_numbers(truth).sum())
        assert counted >= 0.98 * truth.numel()
        place = whole_numbers(truth).nonzero()[counted // 2]
        made[tuple(place)] += 1
        assert f"1 of {counted} whole numbers, first at {place.tolist()}" in missed(made, truth)


@pytest.mark.parametrize(
    "case",
    [case for case in SMALL_CASES if case.name in EXACT],
    ids=lambda case: f"{case.name} {case.shape}",
)
def test_kernels_have_whole_numbers_to_the_bit(case):
    """In fp16, which the interpreter computes right; and one that is wrong in a single number."""

    def narrow(value):
        if value is torch.bfloat16:
            return torch.float16
        is_bf16 = isinstance(value, Tensor) and value.dtype == torch.bfloat16
        return value.half() if is_bf16 else value

    def wrong(**arguments):
        made = case.op(**arguments)
        made, *rest = made if isinstance(made, tuple) else (made,)
        flat = torch.arange(made.numel(), device=made.device).view(made.shape)
        return torch.where(flat == made.numel() // 3, made + 1, made), *rest

    torch.manual_seed(0)
    memory, trials = Memory(DEVICE, rows=64), []
    for of in (memory, whole(memory)):
        trial = Trial.of(case, of, bool(case.trained))
        inputs = {name: narrow(value) for name, value in trial.inputs.items()}
        trials.append(Trial(case, inputs, [narrow(gradient) for gradient in trial.gradients]))
    judge = Judge(*trials)
    assert judge.wrong(case.op, to_the_bit=True) == ""
    if case.name != "rotate_":  # whose outputs are its arguments
        assert judge.wrong(wrong, to_the_bit=True) != ""


def test_sums_of_whole_numbers_fit_bf16_where_they_are_rounded_in_between():
    """x A^T and its gradient are, at the sizes of Llama 3.1 8B (fewer rows)."""
    (case,) = (c for c in CASES if c.name == "lora_linear" and c.shape == "Llama-3.1-8B, rank 64")
    torch.manual_seed(0)
    trial = Trial.of(case, whole(Memory("cpu", rows=64)), backward=True)
    inputs, (dy,) = trial.inputs, trial.gradients
    low = inputs["x"].double() @ inputs["a"].double().T
    dlow = inputs["scale"] * dy.double() @ inputs["b"].double()
    for numbers in (low, dlow):
        assert torch.equal(numbers.bfloat16().double(), numbers)
        assert numbers.abs().max() > 4


def test_an_op_whose_test_is_red_is_refused(tmp_path):
    told = {}
    for colour, truth in (("green", "True"), ("red", "False")):
        file = tmp_path / f"test_{colour}.py"
        file.write_text(f"def test_planted():\n    assert {truth}\n")
        told[colour] = run_tests(file)
    assert told["green"] == ""
    assert told["red"].startswith("test_red.py is red: 1 failed")
    assert run_tests(tmp_path / "test_missing.py") == "there is no test_missing.py"
    bench = bench_of(tested=lambda name: told["red"])
    assert list(bench.rows([norm_case()])) == []
    assert bench.refused == [f"rms_norm: {told['red']}"]


def test_a_file_is_tested_once_for_all_of_its_cases():
    seen = []
    bench = bench_of(tested=lambda name: seen.append(name) or "")
    list(bench.rows([norm_case(), norm_case()]))
    assert seen == ["rmsnorm"]


def test_what_is_missing_is_told_once():
    def lacking(case, inputs):
        raise Absent("somewhere.something")

    offered = [Provider("other", lacking), Provider("reference", lambda case, _: case.reference)]
    bench = Bench(WallClock(), ROOF, 2, 0.0, lambda name: "", lambda case, launch: offered)
    rows = list(bench.rows([norm_case(), norm_case()]))
    assert {row.provider for row in rows} == {"reference"}
    assert (bench.absent, bench.refused) == ({"somewhere.something"}, [])


def test_rounds_go_round_and_end():
    order = []

    def work(name):
        return lambda: lambda: order.append(name)

    took = interleaved({"a": work("a"), "b": work("b")}, WallClock(), 7, 60.0)
    assert order == ["a", "b"] * 10  # three rounds to warm up
    assert [len(some.samples) for some in took.values()] == [7, 7]
    order.clear()
    took = interleaved({"a": work("a")}, WallClock(), 1000, 0.0)
    assert len(took["a"].samples) == 5


def test_waiting_for_the_device_does_not_grow():
    expected = []

    class Waiting(WallClock):
        def sample(self, prepare, launch=0.0):
            expected.append(launch)
            return Sample(1e-6, launch=1.0 + 2 * launch)  # the host waits until the spinning ends

    interleaved({"a": lambda: None}, Waiting(), 5, 60.0)
    assert expected == [0.0] + [1.0] * 7


class FakeGPU:
    """A device of 1,000 cycles a second, whose work takes 7 us and 100 bytes."""

    def __init__(self, patch):
        self.now, self.held, self.peak, self.slept = 0.0, 0, 0, []
        fakes = {
            "_sleep": self._sleep,
            "synchronize": lambda: None,
            "memory_allocated": lambda: self.held,
            "max_memory_allocated": lambda: self.peak,
            "reset_peak_memory_stats": lambda: setattr(self, "peak", self.held),
            "get_device_properties": lambda number: type("", (), {"L2_cache_size": 8})(),
            "Event": lambda enable_timing: FakeEvent(self),
        }
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
        patch.setattr(DeviceClock, "device", "cpu")

    def _sleep(self, cycles: int) -> None:
        self.slept.append(cycles)
        self.now += cycles / 1000

    def work(self) -> None:
        self.now += 7e-6
        self.peak = max(self.peak, self.held + 100)


class FakeEvent:
    def __init__(self, gpu: FakeGPU):
        self.gpu = gpu

    def record(self) -> None:
        self.at = self.gpu.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "FakeEvent") -> float:
        return 1e3 * (other.at - self.at)


def test_a_gpu_waits_for_the_host_and_is_not_charged_for_it(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    clock = DeviceClock()
    gpu.slept.clear()
    gpu.held = 30
    sample = clock.sample(lambda: gpu.work, launch=0.5)
    assert gpu.slept == [1 + 2 * 0.5 * 1000]  # twice the half second, at 1,000 cycles a second
    assert sample.seconds == pytest.approx(7e-6) and sample.peak == 100
    assert 0 < sample.launch < 0.1


def test_no_kernel_is_launched_without_a_gpu():
    case = norm_case()
    assert "triton" in [one.name for one in providers(case, True)]
    assert "triton" not in [one.name for one in providers(case, False)]


@pytest.mark.parametrize("tests", ["", "test_kernels_rmsnorm.py is red: 1 failed"])
def test_the_script_tells_one_document(tests, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "tested", lambda name: tests)
    words = ["--json", "--op", "rms_norm", "--rounds", "2", "--provider", "reference"]
    monkeypatch.setattr(sys, "argv", ["kernels", *words, "torch rms_norm"])
    with pytest.raises(SystemExit) as ended:
        kernels.main()
    told = capsys.readouterr()
    document = json.loads(told.out.splitlines()[-1])
    assert ended.value.code == bool(tests)
    assert "left out" in told.err and ("red" in told.err) == bool(tests)
    assert {"machine", "commit", "rows"} <= {*document}
    rows = document["rows"]
    assert [row["what"] for row in rows[:2]] == ["roofline: copy", "roofline: product"]
    timed = [(row["what"], row["provider"], row["against"]) for row in rows[2:]]
    pairs = [("reference", "torch rms_norm"), ("torch rms_norm", "reference")]
    passes = ("rms_norm forward", "rms_norm forward + backward")
    assert timed == ([] if tests else [(what, *pair) for what in passes for pair in pairs])
    (file,) = tmp_path.rglob("*-kernels.json")
    assert json.loads(file.read_text()) == document
    for row in rows[2:]:
        assert row["p20"] <= row["value"] <= row["p80"]
