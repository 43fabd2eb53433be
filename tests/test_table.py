"""The table: what a row is must not depend on what it is computed with, kept in or trained by."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from models import EXACT, last_states, prompt_set, relative, texts, tiny
from precision import compute_as_on_a_gpu
from small import make_opinionated
from torch.nn.utils import rnn

from fastflag.config import PolicyConfig
from fastflag.files import InputError
from fastflag.model import ops, shared_prefix
from fastflag.model.weights import open_weights
from fastflag.policy import trunk as trunk_module
from fastflag.policy.heads import Statistics
from fastflag.policy.table import Policy
from fastflag.policy.trunk import digest_of
from fastflag.prompt.prompts import PromptSet

WORDS = (7, 11, 13)
ONE = torch.tensor(1.0)
PREFIXES, SUFFIXES = texts((9, 30, 17, 1), 0), texts((1, 5, 16, 17, 30), 1)
for prefix in PREFIXES:
    prefix[0] = 5  # days begin with the same words
PROMPTS = prompt_set(PREFIXES, SUFFIXES)


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return open_weights(str(folder))


def made(weights, seed=0, heads=True, **changes):
    """A policy; with `heads` they are random and not zero."""
    policy = Policy(weights, replace(EXACT, **changes), WORDS, seed)
    generator = torch.Generator().manual_seed(9)
    for parameter in policy.parameter_groups()[1] if heads else []:
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


def take(prompts, rows, days):
    """The given rows of the given days, which stay in order."""
    pairs = prompts.pairs[rows].copy()
    pairs[:, 0] = [days.index(day) for day in pairs[:, 0]]
    return PromptSet(
        tuple(prompts.prefixes[day] for day in days),
        prompts.suffixes,
        pairs,
        prompts.side[rows],
        prompts.allowed[rows],
        np.array([rows.index(row) for row in prompts.centring], dtype=np.int32),
    )


def rows_of(policy, prompts, statistics=None):
    with torch.no_grad():
        table = policy.evaluate(prompts, statistics)
    return torch.cat((table.log_probabilities.exp(), table.value[:, None]), dim=1)


def scrambled(prompts, seed):
    """The same prompts in another order of days, suffixes and rows, and where each row went."""
    random = np.random.default_rng(seed)
    days = random.permutation(len(prompts.prefixes))
    suffixes = random.permutation(len(prompts.suffixes))
    rows = random.permutation(len(prompts.pairs))
    pairs = np.stack(
        (np.argsort(days)[prompts.pairs[rows, 0]], np.argsort(suffixes)[prompts.pairs[rows, 1]]), 1
    )
    return PromptSet(
        tuple(prompts.prefixes[day] for day in days),
        tuple(prompts.suffixes[text] for text in suffixes),
        pairs.astype(np.int32),
        prompts.side[rows],
        prompts.allowed[rows],
        np.argsort(rows)[prompts.centring].astype(np.int32),
    ), rows


@pytest.mark.parametrize("top_layers", [0, 1, 3])
def test_which_other_prompts_are_in_the_set_never_changes_a_row(weights, top_layers):
    whole = rows_of(made(weights, top_layers=top_layers), PROMPTS)
    rows = [*PROMPTS.centring.tolist(), 3, 19]
    assert len(set(rows)) == len(rows) < len(PROMPTS.pairs)
    few = rows_of(made(weights, top_layers=top_layers), take(PROMPTS, rows, [0, 1, 2, 3]))
    assert relative(few, whole[rows]) < 1e-5
    other, places = scrambled(PROMPTS, 5)
    moved = rows_of(made(weights, top_layers=top_layers), other)
    assert relative(moved, whole[places]) < 1e-5


def test_statistics_are_of_the_reference_rows_and_can_be_given(weights, model):
    policy = made(weights)
    with torch.no_grad():
        states = last_states(model.model, PROMPTS)
        table = policy.evaluate(PROMPTS)
    for number, side in enumerate((-1, 0, 1)):
        of_side = [row for row in PROMPTS.centring if PROMPTS.side[row] == side]
        assert relative(table.statistics.mean[number], states[of_side].mean(0)) < 1e-5
    shift = torch.tensor([0.5, 1.5, -0.5])
    known = torch.ones(3, dtype=torch.bool)
    given = Statistics(shift[:, None].expand(3, 64), torch.full((64,), 2.0), known)
    side = PROMPTS.side + 1
    head = {name: p.detach() for name, p in policy.value_head.named_parameters()}
    expected = (states - shift[side][:, None]) / 2.0 @ head["body.weight"].T + head["bias"][side]
    rows = rows_of(policy, PROMPTS, given)
    assert relative(rows[:, 3], expected[:, 0]) < 1e-5
    # One prompt given the statistics of all is the same row: how a decision is made.
    one = replace(
        prompt_set(PREFIXES[1:2], SUFFIXES[2:3]),
        side=PROMPTS.side[7:8],
        centring=np.zeros(0, dtype=np.int32),
    )
    assert relative(rows_of(policy, one, given)[0, 3:], rows[7, 3:]) < 1e-5
    with pytest.raises(ValueError, match="needs statistics"):
        policy.evaluate(one)


# The trunk


def captured(policy, prompts):
    with torch.no_grad():
        prefixes = {digest_of(tokens): tokens for tokens in prompts.prefixes}
        return policy.trunk.prefix_states(prefixes), policy.trunk.suffix_states(prompts)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Random weights of SmolLM2's widths: small products take other paths than real ones."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 3}
    folder = tmp_path_factory.mktemp("wide")
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    tiny("llama", **shape, **heads, max_position_embeddings=8192).save_pretrained(folder)
    return open_weights(str(folder))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_trunk_activations_have_the_same_bits_whatever_they_are_batched_with(
    wide, dtype, monkeypatch
):
    monkeypatch.setattr(trunk_module, "_TOKENS", 32 * 16)
    policy = made(wide, dtype=dtype, trunk_weights="nf4", trunk_cache_mb=0, trunk_disk_mb=0)
    prefixes = texts((1, 153, 7, 158, 155, 170), 2)
    suffixes = texts([*range(1, 25), 33, 40, *[14] * 30], 3)
    whole = prompt_set(prefixes[:3], suffixes)
    hidden, states = captured(policy, whole)
    beside, _ = captured(policy, prompt_set(prefixes, suffixes[:1]))
    assert all(torch.equal(*both) for both in zip(hidden, beside, strict=False))
    random = np.random.default_rng(0)
    for count in (1, 2, 3, 11):
        texts_of = random.permutation(26)[:count]
        few = prompt_set(
            (prefixes[3], prefixes[2], prefixes[1]), tuple(suffixes[t] for t in texts_of)
        )
        some_hidden, some_states = captured(policy, few)
        assert torch.equal(some_hidden[1], hidden[2]) and torch.equal(some_hidden[2], hidden[1])
        for row, (day, text) in enumerate(few.pairs):
            if day > 0:
                old = {1: 2, 2: 1}[int(day)] * len(suffixes) + texts_of[text]
                assert torch.equal(some_states[row], states[old]), (count, row)


def test_a_gpus_passes_are_larger_and_keep_views(wide, monkeypatch):
    """In a GPU's parts, and with views of them in the cache, the activations are the same."""
    compute_as_on_a_gpu(monkeypatch)
    prompts = prompt_set(texts((7, 20, 31, 40), 2), texts([3, 8, *range(11, 25), 40, 46], 3))
    plain = captured(made(wide, trunk_disk_mb=0), prompts)
    monkeypatch.setattr(trunk_module, "_TOKENS", 64)
    policy = made(wide, trunk_disk_mb=0)
    policy.trunk._on_gpu, policy.trunk._tokens = True, 10**6
    for _ in range(2):  # from the cache too
        for ours, theirs in zip(captured(policy, prompts), plain, strict=True):
            assert len(ours) == len(theirs) > 0
            for one, other in zip(ours, theirs, strict=True):
                assert relative(one, other) < 1e-5


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_row_has_the_same_bits_whatever_is_beside_it(wide, dtype, threads):
    """Few and many, of days and texts of every length: those of a window in a backtest are found
    by guessing, and a later day must not be seen in the last bit of an earlier one."""
    policy = made(wide, dtype=dtype, top_layers=2, trunk_disk_mb=0)
    make_opinionated(policy)
    prompts = prompt_set(texts((7, 20, 31, 40, 45, 63), 2), texts([3, 8, *range(11, 25), 40], 3))
    statistics, random = policy.running.current(), np.random.default_rng(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            table = policy.evaluate(prompts, statistics)
            for _ in range(6):
                rows = random.choice(len(prompts.pairs), random.integers(1, 20), replace=False)
                chosen = replace(prompts, centring=rows[:1].astype(np.int32))
                some, place = chosen.subset(rows)
                of_some = policy.evaluate(some, statistics)
                assert torch.equal(of_some.value[place], table.value[rows]), len(rows)
                got = of_some.log_probabilities[place]
                assert torch.equal(got, table.log_probabilities[rows]), len(rows)
    finally:
        torch.set_num_threads(before)


def test_where_no_layer_is_frozen_nothing_is_run_twice(weights, monkeypatch):
    policy = made(weights, top_layers=weights.config.layers, trunk_disk_mb=0)
    rows_of(policy, prompt_set(PREFIXES, SUFFIXES[:2]))
    seen, embed = [], policy.trunk._embed
    monkeypatch.setattr(policy.trunk, "_embed", lambda some: seen.append(len(some)) or embed(some))
    rows_of(policy, prompt_set(PREFIXES, SUFFIXES[:3]))
    assert seen == [len(PREFIXES) * 2]  # the pieces of the third text, of 16 tokens


@pytest.mark.parametrize("budget", [0, 10_000, 100_000, 2**30])
@pytest.mark.parametrize("top_layers", [0, 1, 3])
def test_the_cache_never_changes_a_row(weights, budget, top_layers):
    policy = made(weights, top_layers=top_layers)
    policy.trunk.cache.budget_bytes = budget
    fresh = [
        rows_of(made(weights, top_layers=top_layers, trunk_cache_mb=0), prompts)
        for prompts in (PROMPTS, scrambled(PROMPTS, 1)[0])
    ]
    for _ in range(2):
        for prompts, expected in zip((PROMPTS, scrambled(PROMPTS, 1)[0]), fresh, strict=True):
            assert torch.equal(rows_of(policy, prompts), expected)
            assert policy.trunk.cache.used_bytes <= budget


def test_a_text_goes_through_the_trunk_once(weights, monkeypatch):
    policy = made(weights)
    rows_of(policy, PROMPTS)
    seen = []
    forward = policy.trunk.blocks[0].finish
    monkeypatch.setattr(
        policy.trunk.blocks[0], "finish", lambda x, y: seen.append(x) or forward(x, y)
    )
    rows_of(policy, scrambled(PROMPTS, 2)[0])
    assert seen == []
    another = prompt_set((*PREFIXES[1:3], texts((4,), 8)[0]), SUFFIXES[1:])
    rows_of(policy, another)
    # The new day's prefix, then the pieces of its short texts and each long one; the other days'
    # are kept.
    short = [text for text in SUFFIXES[1:] if len(text) <= 16]
    long = {(1, -(-len(text) // 8) * 8) for text in SUFFIXES[1:] if len(text) > 16}
    (first, *rest) = [tuple(x.shape[:2]) for x in seen]
    assert first == (1, 8)
    assert {*rest} == {(sum(-(-len(text) // 8) for text in short), 8), *long} and len(long) > 1


def test_texts_that_begin_alike_have_their_beginnings_in_common(weights, monkeypatch):
    """The same bits as of each text by itself, in as many pieces as there are distinct ones. Long
    texts go through whole, those of one padded length together."""
    first, second, third = texts((8, 8, 20), 5)
    suffixes = (
        np.concatenate([first, second[:7]]),
        np.concatenate([first, second]),
        first,
        np.concatenate([first, second, third]),
        np.concatenate([second, third[:12]]),
        np.concatenate([first, third[:9]]),
        np.concatenate([second, first[:3]]),
        first[:5],
    )
    pieces = 3 + 3  # by depth
    policy = made(weights, trunk_cache_mb=0, trunk_disk_mb=0)
    alone = [captured(policy, prompt_set(PREFIXES[:2], (text,)))[1] for text in suffixes]
    seen, finish = [], policy.trunk.blocks[0].finish
    monkeypatch.setattr(
        policy.trunk.blocks[0], "finish", lambda x, y: seen.append(len(x)) or finish(x, y)
    )
    prompts = prompt_set(PREFIXES[:2], suffixes)
    _, together = captured(policy, prompts)
    for row, (day, text) in enumerate(prompts.pairs.tolist()):
        assert torch.equal(together[row], alone[text][day]), (day, text)
    assert seen[-3:] == [2 * pieces, 2 * 1, 2 * 2]


def test_padding_never_changes_a_row(weights, monkeypatch):
    expected = rows_of(made(weights), PROMPTS)
    poisoned = made(weights)
    # Token 0 pads the trunk's batches and is in no text; zeros pad the top's.
    poisoned.trunk._embedding[0] = 1e3 * torch.randn(64, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(
        shared_prefix,
        "pad_sequence",
        lambda parts, batch_first: rnn.pad_sequence(parts, batch_first, padding_value=77.0),
    )
    assert torch.equal(rows_of(poisoned, PROMPTS), expected)


# The language model's own head, and the policy before training


def test_the_lm_head_is_the_models_renormalised_probability_of_the_words(weights, model):
    with torch.no_grad():
        logits = model.lm_head(last_states(model.model, PROMPTS))
        ours = made(weights, head="lm").evaluate(PROMPTS)
    probabilities = logits.softmax(-1)[:, list(WORDS)] * torch.from_numpy(PROMPTS.allowed)
    expected = probabilities / probabilities.sum(1, keepdim=True)
    torch.testing.assert_close(ours.log_probabilities.exp(), expected, rtol=1e-4, atol=1e-6)
    assert (expected[PROMPTS.allowed.all(1)].max(1).values > 0.5).any(), "not near uniform"


@pytest.mark.parametrize("adaptation", ["lora", "full"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_an_untrained_policy_is_uniform_over_the_allowed_actions(weights, adaptation, head):
    policy = made(weights, heads=False, adaptation=adaptation, head=head)
    expected = PROMPTS.allowed / PROMPTS.allowed.sum(1, keepdims=True)
    table = policy.evaluate(PROMPTS)
    np.testing.assert_allclose(table.probabilities, expected, rtol=1e-6)
    assert table.probabilities.dtype == np.float64
    assert (table.probabilities[~PROMPTS.allowed] == 0).all()
    np.testing.assert_allclose(table.probabilities.sum(1), 1.0, rtol=1e-15)
    assert torch.equal(table.value, torch.zeros(len(expected)))
    train(policy, 2)
    assert np.abs(policy.evaluate(PROMPTS).probabilities - expected).max() > 0.01
    initial = policy.initial_log_probabilities(PROMPTS).exp().double().numpy()
    np.testing.assert_allclose(initial, expected, rtol=1e-6)


def loss_of(table):
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(table.log_probabilities.shape, generator=generator)
    allowed = torch.from_numpy(PROMPTS.allowed)
    return (weight * torch.where(allowed, table.log_probabilities, 0.0)).sum() + table.value.sum()


def train(policy, steps):
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(policy.evaluate(PROMPTS)).backward()
        optimizer.step()


@pytest.mark.parametrize("adaptation", ["lora", "full"])
def test_initial_probabilities_of_the_lm_head_stay_those_before_training(weights, adaptation):
    policy = made(weights, head="lm", adaptation=adaptation)
    before = rows_of(policy, PROMPTS)[:, :3]
    some = take(PROMPTS, [*PROMPTS.centring.tolist(), 3], [0, 1, 2, 3])
    torch.testing.assert_close(policy.initial_log_probabilities(some)[-1].exp(), before[3])
    train(policy, 3)
    after = rows_of(policy, PROMPTS)
    assert (after[:, :3] - before).abs().max() > 0.05
    torch.testing.assert_close(policy.initial_log_probabilities(PROMPTS).exp(), before)
    assert torch.equal(rows_of(policy, PROMPTS), after), "the trained parameters are back"
    fewer = PROMPTS.allowed.copy()
    fewer[:, 0] = False
    masked = replace(PROMPTS, allowed=fewer)
    assert (policy.initial_log_probabilities(masked).exp()[:, 0] == 0).all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("adaptation", ["lora", "full"])
def test_asking_for_the_initial_policy_leaves_a_waiting_backward_pass_intact(
    weights, adaptation, dtype
):
    gradients = []
    for asks in (False, True):
        policy = made(weights, head="lm", adaptation=adaptation, dtype=dtype)
        train(policy, 1)
        policy.zero_grad()
        table = policy.evaluate(PROMPTS)
        if asks:
            policy.initial_log_probabilities(PROMPTS)
        loss_of(table).backward()
        gradients.append([parameter.grad for parameter in policy.parameters()])
    for plain, asked in zip(*gradients, strict=True):
        assert torch.equal(plain, asked)
        assert plain.norm() > 0


def test_a_later_policy_finds_the_trunks_work_done_on_disk(weights, monkeypatch):
    """The same bits, and no pass through the trunk; another storage or depth finds nothing."""
    first = made(weights, trunk_weights="nf4")
    expected = rows_of(first, PROMPTS)
    first.trunk.cache.flush()
    later = made(weights, trunk_weights="nf4", trunk_cache_mb=1)
    with monkeypatch.context() as patch:
        patch.setattr(later.trunk, "_run", None)
        assert torch.equal(rows_of(later, PROMPTS), expected)

    def finds_nothing(**changes):
        policy = made(weights, **{"trunk_weights": "nf4", **changes})
        with monkeypatch.context() as patch, pytest.raises(TypeError):
            patch.setattr(policy.trunk, "_run", None)
            rows_of(policy, PROMPTS)

    for other in ({"trunk_weights": "bf16"}, {"top_layers": 2}, {"trunk_disk_mb": 0}):
        finds_nothing(**other)
    product = ops.linear
    monkeypatch.setattr(ops, "linear", lambda *given: product(*given).nextafter(ONE))
    finds_nothing()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("head", ["linear", "mlp", "lm"])
def test_a_head_gives_a_row_the_same_bits_beside_any_others(wide, head, threads):
    policy = made(wide, head=head, trunk_disk_mb=0)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1200, 576, generator=generator)
    side = torch.randint(0, 3, (1200,), generator=generator)
    allowed = torch.ones(1200, 3, dtype=torch.bool)
    statistics = Statistics(torch.randn(3, 576), torch.ones(576), torch.ones(3, dtype=torch.bool))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            whole = policy._read_out(features, side, allowed, statistics)
            for count in (1, 7, 8, 16, 64, 200, 803, 1200):
                given = features[:count], side[:count], allowed[:count]
                some = policy._read_out(*given, statistics)
                assert torch.equal(some.value, whole.value[:count]), count
                found, expected = some.log_probabilities, whole.log_probabilities[:count]
                assert torch.equal(found, expected), count
    finally:
        torch.set_num_threads(before)


# What a policy is made of


def test_parameters_and_groups(weights):
    for adaptation, count in (("lora", 14), ("full", 7)):
        policy = made(weights, adaptation=adaptation, top_layers=2)
        layers, heads = policy.parameter_groups()
        assert len(layers) == 2 * count
        assert len(heads) == 4
        assert {*map(id, layers), *map(id, heads)} == {*map(id, policy.parameters())}
        assert all(parameter.dtype == torch.float32 for parameter in policy.parameters())
    assert len(made(weights, head="lm").parameter_groups()[1]) == 2
    state = made(weights, top_layers=1).state_dict()
    assert not any("base" in name or "trunk" in name for name in state), "frozen ones not saved"
    assert {"running.mean", "running.deviation", "running.count"} < set(state)


def test_one_seed_one_policy(weights):
    def state(seed):
        torch.manual_seed(seed + 17)
        return made(weights, seed, heads=False, head="mlp").state_dict()

    one, same, other = state(1), state(1), state(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    name = "top.0.q.lora_a"
    assert not torch.equal(one[name], other[name])


def test_top_layers_must_fit_the_model(weights):
    with pytest.raises(InputError, match="top_layers must be 0 to 3"):
        made(weights, top_layers=4)


def test_prompts_longer_than_the_models_positions_are_refused(weights):
    positions = weights.config.max_positions
    policy = made(weights)
    fits, over = (
        prompt_set(texts((5, n), 0), texts((9, 3), 1)) for n in (positions - 9, positions - 8)
    )
    rows_of(policy, fits)
    with pytest.raises(
        InputError, match=f"a prompt can have {positions + 1} tokens, the model reads"
    ):
        rows_of(policy, over)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(weights):
    with pytest.raises(InputError, match="--device cuda"):
        made(weights, device="cuda")


def test_bf16_is_near_fp32(weights):
    exact = rows_of(made(weights), PROMPTS)[:, :3]
    default = PolicyConfig()
    assert (default.dtype, default.trunk_weights) == ("auto", "nf4")
    rough = rows_of(made(weights, dtype="bf16", trunk_weights="bf16"), PROMPTS)[:, :3]
    assert 0 < (rough - exact).norm() / exact.norm() < 0.1
