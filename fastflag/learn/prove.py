"""When kernels prove themselves for a training, and by what: the parent's side, and the child's.

    python -m fastflag.learn.prove    the child: its request comes on stdin (model/proof/child.py)

A proof comes before the parent has anything on the GPU, never in the middle of a run, and a run
goes on with what it began with.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

from fastflag.config import PlanConfig, PolicyConfig, TrainConfig
from fastflag.learn.whole_update import prove_graphs
from fastflag.market.tasks.portfolio import actions_of
from fastflag.market.tasks.single import ACTIONS
from fastflag.model import ops
from fastflag.model.arithmetic import device_of
from fastflag.model.model_config import ModelConfig
from fastflag.model.proof import child, gpu, parent
from fastflag.model.proof.choice import GRAPHS, choices, to_prove, written
from fastflag.model.proof.gpu import Gpu
from fastflag.model.proof.key import Subject, Surroundings
from fastflag.model.proof.layer import LAYER, confirm
from fastflag.model.proof.parent import Begun
from fastflag.model.proof.verdicts import Verdict, Verdicts, locked
from fastflag.policy import graphs

COMMAND = (sys.executable, "-m", "fastflag.learn.prove")
SECONDS = 60.0
"""What a proof is expected to take; no GPU has measured it."""
_WORTH = 10
# An update's least time a layer, by launches: 198 operators with the backward pass (bench.launches)
# of 5 microseconds; and by arithmetic, at a rate that few GPUs reach in such shapes.
_LAUNCHES, _LAUNCH_SECONDS, _RATE = 198, 5e-6, 2e14

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Proof:
    """What may be proved for a policy on this machine's GPU."""

    gpu: Gpu
    verdicts: Verdicts

    @staticmethod
    def of(policy: PolicyConfig, model: ModelConfig, actions: int = len(ACTIONS)) -> "Proof | None":
        """For a task of so many actions. None where it does not run on an NVIDIA GPU. A dtype that
        is left open is the one that such a GPU is fast in: measuring it would take the GPU first.
        """
        found = None if policy.device == "cpu" else gpu.first()
        if found is None or device_of(policy.device).type == "cpu":
            return None
        dtype = policy.dtype if policy.dtype != "auto" else "bf16" if found.bf16 else "fp32"
        subject = Subject.of(model, policy, dtype, actions)
        return Proof(found, Verdicts(subject, Surroundings.of(found)))

    @property
    def missing(self) -> tuple[str, ...]:
        """What has no verdict; and a layer and graphs where what they would be made of is among
        it, since theirs are of what was chosen then."""
        missing = {op for op in to_prove() if self.verdicts.read(op) is None}
        missing |= {LAYER, GRAPHS} if missing - {LAYER, GRAPHS} else set()
        missing |= {GRAPHS} if LAYER in missing else set()
        return tuple(op for op in to_prove() if op in missing)

    def run(self, begun: Callable[[str, int, int], None]) -> None:
        """Proves what has no verdict and keeps what is found. `begun` is told what is done, and
        how many of how many are."""
        waiting = "waiting for another process's proof on this GPU"
        with locked(self.gpu.uuid, lambda: begun(waiting, 0, 1)):
            missing = self.missing  # the other process may have found it
            kept = tuple(filter(None, map(self.verdicts.read, {*to_prove()} - {*missing})))
            request = child.Request(self.verdicts.subject, missing, verdicts=kept)
            done = 0
            for told in parent.prove(COMMAND, request) if missing else ():
                if isinstance(told, Begun):
                    begun(f"{told.op} {told.implementation}".strip(), done, len(missing))
                elif isinstance(told, Verdict):
                    self.verdicts.keep(told)
                    done += 1
                else:
                    _LOG.warning("not proved: %s: %s", ", ".join(told.ops), told.why)


def prove_for(
    config: TrainConfig,
    model: ModelConfig,
    done: int,
    begun: Callable[[str, int, int], None],
) -> Proof | None:
    """The proof for a training of which `done` updates are done: what is kept, and what is not yet,
    where the work ahead is over ten times as long as finding it. None on a CPU, and where kernels
    and graphs are both named."""
    if config.policy.kernels != "auto" and config.policy.graphs != "auto":
        return None
    of_portfolio = config.task == "portfolio"
    names = actions_of(config.simulator.positions) if of_portfolio else ACTIONS
    proof = Proof.of(config.policy, model, len(names))
    worth = seconds_ahead(config, model, done) > _WORTH * SECONDS
    if proof is not None and worth and ops.left_open() and proof.missing:
        proof.run(begun)
    return proof


def with_implementations(config: TrainConfig, proof: Proof | None) -> TrainConfig:
    """The configuration with the implementations that it names, or those that the environment or a
    proof does. Raises InputError for an environment that asks for what there is not."""
    policy = config.policy
    device = device_of(policy.device)
    verdicts = (
        None if proof is None or proof.verdicts.subject.dtype != policy.dtype else proof.verdicts
    )
    if policy.graphs == "auto":
        found = choices(verdicts)[GRAPHS]
        replayed = graphs.choice(device, found).implementation
        # With a budget none is replayed, since each keeps an evaluation.
        on = replayed == "on" and not policy.memory_budget
        policy = replace(policy, graphs="on" if on else "off")
    if policy.kernels == "auto":
        ops.settle(choices(verdicts, policy.graphs == "on"))
        policy = replace(policy, kernels=written({op.name: op.choice(device) for op in ops.OPS}))
    return replace(config, policy=policy)


def seconds_ahead(config: TrainConfig, model: ModelConfig, done: int) -> float:
    """At least, of a training's updates, by arithmetic."""
    batch, layers = PlanConfig(), config.policy.top_layers
    queries = (model.heads + model.kv_heads) * model.head_dim
    numbers = layers * model.width * (2 * queries + 3 * model.mlp_width)
    tokens = batch.days * (batch.prefix_tokens + batch.texts * batch.suffix_tokens)
    of_products = 4 * numbers * tokens / _RATE  # forward, and the gradients of activations
    one = max(layers * _LAUNCHES * _LAUNCH_SECONDS, of_products)
    return (config.updates - done) * config.algorithm.update_epochs * one


if __name__ == "__main__":
    child.main({LAYER: confirm, GRAPHS: prove_graphs})
