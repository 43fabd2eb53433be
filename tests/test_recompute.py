"""Gradient checkpointing: the same numbers within any budget, and retries on out-of-memory."""

import gc
import logging
import weakref

import pytest
import torch
from small import make_opinionated, small_config, small_market, small_world

import fastflag.policy.table as table_module
from fastflag.learn.batch import start_accounts
from fastflag.learn.progress import PhaseTimer
from fastflag.learn.rollout import rollout
from fastflag.model.recompute import Recompute, ran_out
from fastflag.policy import plan

pytestmark = pytest.mark.usefixtures("one_thread")


def evaluated(model, budget, **changes):
    """(log-probabilities, values, gradients, bytes that autograd kept) of one rollout's prompts."""
    config = small_config(model, policy__top_layers=2, **changes)
    world, policy, days = small_world(config, small_market())
    make_opinionated(policy)
    policy.recompute = Recompute(budget)
    accounts = start_accounts(config.rollout, config.simulator.cash)
    # By weak reference: what another pass lets go of does not count.
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = weakref.ref(tensor), storage.nbytes()
        return tensor

    known = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        table, batches = rollout(policy, world, [days], accounts, config, 0, PhaseTimer())
        list(batches)
    gc.collect()
    kept = sum(
        size for at, (ref, size) in storages.items() if ref() is not None and at not in known
    )
    finite = table.log_probabilities.nan_to_num(neginf=0.0)
    (finite.square().sum() + table.value.sin().sum()).backward()
    gradients = [p.grad for p in policy.parameters()]
    return table.log_probabilities.detach(), table.value.detach(), gradients, kept


@pytest.mark.parametrize("changes", [{}, {"prompt__account": "exact"}], ids=["stepped", "exact"])
@pytest.mark.parametrize("adaptation", ["lora", "full"])
def test_the_gradient_is_the_same_within_any_budget(tiny_model, adaptation, changes):
    changes = changes | {"policy__adaptation": adaptation}
    *whole, most = evaluated(tiny_model, 0, **changes)
    kept = [most]
    for budget in (10**6, 10**5, 1):
        *parts, some = evaluated(tiny_model, budget, **changes)
        kept.append(some)
        for one, other in zip(whole[:2], parts[:2], strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=3e-6)
        for one, other in zip(whole[2], parts[2], strict=True):
            assert one.norm() > 0
            assert (one - other).norm() <= 1e-5 * one.norm()
    assert kept == sorted(kept, reverse=True) and kept[-1] < most / 3


def test_all_at_once_is_cut_into_parts_too(tiny_model, monkeypatch):
    monkeypatch.setattr("fastflag.learn.rollout._MANY_STEPS", 1)
    *whole, most = evaluated(tiny_model, 0)
    *parts, some = evaluated(tiny_model, 50_000)
    assert some < most / 2
    for one, other in zip(whole[2], parts[2], strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()


def test_passes_are_kept_while_they_fit_into_half_the_budget(monkeypatch):
    recompute, again = Recompute(100), []

    def checkpoint(work, part, **named):
        again.append(part.stop - part.start)
        return work(part)

    monkeypatch.setattr("fastflag.model.recompute.checkpoint", checkpoint)
    ran = []

    def work(part):
        ran.append(part.stop - part.start)
        return torch.zeros(1, requires_grad=True) * 2

    def run(rows):
        ran.clear()
        recompute.run(work, rows, lambda rows: 10 * rows)
        return ran

    assert run(3) == [3] and run(2) == [2]  # 50 bytes
    assert not again
    assert run(1) == [1] and run(12) == [3, 3, 3, 3]  # half the budget is 5 rows
    assert again == [1, 3, 3, 3, 3]
    recompute.restart()
    assert run(5) == [5] and len(again) == 5
    with torch.no_grad():
        assert run(6) == [3, 3]


class Machine:
    """Has memory for so many rows of suffixes at a time."""

    def __init__(self, monkeypatch, rows):
        self.rows, self.calls, right = rows, [], table_module.suffix_pass

        def suffix_pass(blocks, x, *arguments, **named):
            # Only the trained layers' pass, whose memory the budget is of.
            if named.get("last_only"):
                self.calls.append(len(x))
                if len(x) > self.rows:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return right(blocks, x, *arguments, **named)

        monkeypatch.setattr(table_module, "suffix_pass", suffix_pass)


def test_out_of_memory_halves_until_it_fits_and_says_so(tiny_model, tmp_path, monkeypatch, caplog):
    from test_train import trained

    config = small_config(tiny_model, algorithm__update_epochs=2)
    _, whole = trained(config, tmp_path / "whole")
    machine = Machine(monkeypatch, 12)
    with caplog.at_level(logging.WARNING):
        _, halved = trained(config, tmp_path / "halved")
    assert max(machine.calls) > 12
    assert "out of memory: going on with --memory-budget" in caplog.text
    assert len(halved) == len(whole) == 4
    for one, other in zip(whole, halved, strict=True):
        assert other == pytest.approx(one, rel=2e-3, abs=1e-5)


def test_one_prompt_that_does_not_fit_ends_it(tiny_model, tmp_path, monkeypatch):
    from test_train import trained

    Machine(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        trained(small_config(tiny_model), tmp_path / "run")


def test_memory_that_the_top_layers_do_not_take_is_not_waited_for():
    tried = []

    def fail():
        tried.append(1)
        raise MemoryError

    with pytest.raises(MemoryError):
        Recompute(0).attempt(fail)
    assert len(tried) == 1


def test_it_goes_on_while_any_pass_can_be_cut():
    """One prompt of a day says nothing of the days' own pass."""
    recompute, sizes = Recompute(0), []

    def attempt():
        for rows in (8, 1):
            parts = []
            recompute.run(
                lambda part: parts.append(part.stop - part.start),  # noqa: B023
                rows,
                lambda rows: 100 + 10 * rows,
            )
            sizes.append(max(parts))
        if max(sizes[-2:]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with torch.enable_grad():
        recompute.attempt(attempt)
    assert sizes[-2:] == [2, 1] and sizes[:2] == [8, 1]


def test_memory_of_others_is_given_back_before_anything_is_cut(caplog):
    """Also where nothing can be cut, and once what was given back is all there was."""
    free, asked = [5 * 2**20, 2**20], []
    recompute = Recompute(0, lambda: free.pop(0) if free else 0)

    def attempt(divisible):
        asked.append(recompute._budget)
        recompute.restart()
        if divisible:
            recompute.run(lambda part: None, 4, lambda rows: rows)
        raise torch.OutOfMemoryError("CUDA out of memory")

    for divisible, attempts in ((False, 3), (True, 1)):
        with pytest.raises(torch.OutOfMemoryError), torch.enable_grad():
            recompute.attempt(lambda: attempt(divisible))  # noqa: B023
        assert asked[:attempts] == [torch.inf] * attempts and not free
        del asked[:attempts]
    told = [record.message for record in caplog.records]
    assert told[:2] == [
        f"out of memory: {megabytes} MB of frozen activations are given back"
        for megabytes in (5, 1)
    ]
    assert told[2].startswith("out of memory: going on with --memory-budget")


def test_what_is_committed_is_not_done_again():
    recompute, log = Recompute(0), []

    def later():
        recompute.run(lambda part: None, 4, lambda rows: rows)
        log.append("later")
        raise MemoryError

    def update():
        recompute.run(lambda part: None, 8, lambda rows: rows)
        log.append("step")
        recompute.commit()
        recompute.attempt(later)

    with pytest.raises(MemoryError):
        recompute.attempt(update)
    assert log.count("step") == 1 and log.count("later") > 1


def test_other_errors_are_not_taken_for_want_of_memory():
    def fail():
        raise RuntimeError("expected scalar type Float but found BFloat16")

    with pytest.raises(RuntimeError, match="scalar type"):
        Recompute(0).attempt(fail)
    assert ran_out(MemoryError())
    assert ran_out(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"))


def test_the_costs_add_up_to_the_plan(tiny_model):
    """An evaluation is a pass over prefixes, one over suffixes, and what reads them out."""
    from fastflag.config import PlanConfig

    config = small_config(tiny_model, policy__top_layers=2)
    _, policy, _ = small_world(config, small_market())
    batch = PlanConfig(days=5, texts=3, prefix_tokens=70, suffix_tokens=16)
    given = policy.model, config.policy
    parts = plan.prefix_bytes(*given, 5, 70, True) + plan.suffix_bytes(*given, 15, 16, 5, 70, True)
    whole = plan.parts(*given, "adamw", batch, 3)["activations"]
    assert 0.9 * whole < parts < whole


def test_memory_that_the_optimiser_lacks_ends_it_and_repeats_no_step(
    tiny_model, tmp_path, monkeypatch
):
    from test_train import trained

    steps, right = [], torch.optim.AdamW.step

    def step(self, *arguments):
        steps.append(1)
        if len(steps) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(torch.OutOfMemoryError):
        trained(small_config(tiny_model, algorithm__update_epochs=3), tmp_path / "run")
    assert len(steps) == 2


def test_a_plan_keeps_to_the_budget(tiny_model):
    from fastflag.config import PlanConfig

    config = small_config(tiny_model, policy__memory_budget=1)
    _, policy, _ = small_world(config, small_market())
    batch = PlanConfig(days=64, texts=100)
    parts = plan.parts(policy.model, config.policy, "adamw", batch, 3)
    assert parts["activations"] == 2**20


def test_a_run_goes_on_with_another_budget(tiny_model, tmp_path):
    from test_train import trained

    config = small_config(tiny_model, total_timesteps=2 * 24)
    whole = trained(config, tmp_path / "run")
    other = small_config(tiny_model, total_timesteps=2 * 24, policy__memory_budget=7)
    assert trained(other, tmp_path / "run", resume=True) == whole
