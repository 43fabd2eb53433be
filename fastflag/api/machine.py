"""The machine: what it has, what its kernels prove, and what a training takes of its memory."""

from fastflag.config import AlgorithmConfig, Optimizer, PlanConfig, PolicyConfig, checked
from fastflag.evaluate.results import Examination, MemoryPlan


def doctor(policy: PolicyConfig | None = None) -> Examination:
    """What this machine has, and which implementation each op uses, and why, to train `policy`."""
    from fastflag.evaluate.doctor import examine

    return Examination(**examine(policy))


def prove(policy: PolicyConfig | None = None) -> None:
    """Has kernels prove themselves on this GPU, to train `policy`. InputError without one."""
    from fastflag.evaluate.doctor import prove

    prove(policy or PolicyConfig())


def forget_proofs() -> int:
    """Removes what kernels proved, of every model; how many ops that were."""
    from fastflag.evaluate.doctor import forget

    return forget()


def plan(
    policy: PolicyConfig | None = None,
    optimizer: Optimizer = AlgorithmConfig.optimizer,
    batch: PlanConfig | None = None,
) -> MemoryPlan:
    """What training takes of a GPU's memory, in bytes, by part. Raises InputError for settings that
    do not fit, and for a model that can't be read."""
    from fastflag.evaluate import doctor

    policy = checked(PolicyConfig() if policy is None else policy, PolicyConfig, "plan()")
    batch = checked(PlanConfig() if batch is None else batch, PlanConfig, "plan()")
    checked(AlgorithmConfig(optimizer=optimizer), AlgorithmConfig, "plan()")
    return MemoryPlan(**doctor.plan(policy, optimizer, batch))


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no memory."""
    from fastflag.model import recompute

    return recompute.ran_out(error)
