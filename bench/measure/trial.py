"""One pass of a case by any function of its inputs, and whether what it computes is right."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bench.measure.cases import Case, Inputs, Memory, tensors
from bench.measure.clock import Work
from fastflag.model.exactness import missed, refusal

# Of whole numbers a gradient has one in so many that is not 0, so that sums over 14,336 outputs
# stay below 256, which bf16 has to the unit.
_SPARSE = 64


class Trial:
    """One pass of a case, with one set of inputs and gradients."""

    def __init__(self, case: Case, inputs: Inputs, gradients: list[Tensor]):
        """Backward too where there are gradients."""
        self.case, self.inputs, self.gradients = case, inputs, gradients
        self.backward = bool(gradients)
        self.what = f"{case.name} forward" + (" + backward" if gradients else "")

    @classmethod
    def of(cls, case: Case, memory: Memory, backward: bool) -> "Trial":
        """With inputs and gradients made in `memory`."""
        inputs = case.inputs(memory)
        if not backward:
            return cls(case, inputs, [])
        with torch.no_grad():
            outputs = tensors(case.reference(**case.given(inputs)[0]))
        gradients = [torch.randn_like(output) for output in outputs]
        if memory.whole:
            kept = (torch.rand_like(gradient) < 1 / _SPARSE for gradient in gradients)
            gradients = [g.sign() * keep for g, keep in zip(gradients, kept, strict=True)]
        return cls(case, inputs, gradients)

    def exact(self) -> "Trial":
        """The same numbers in fp64."""
        inputs = {name: _wide(value) for name, value in self.inputs.items()}
        return Trial(self.case, inputs, [gradient.double() for gradient in self.gradients])

    def maker(self, function: Callable, count: int | None = None) -> Callable[[], Work]:
        """Makes calls of `function`, each with inputs and gradients of its own, which some
        functions overwrite. A call returns outputs (the first `count`) and then gradients."""

        def make() -> Work:
            with torch.set_grad_enabled(self.backward):
                given, leaves = self.case.given(self.inputs)
            gradients = [gradient.clone() for gradient in self.gradients]

            def work() -> list[Tensor]:
                with torch.set_grad_enabled(self.backward):
                    outputs = tensors(function(**given))[:count]
                if not self.backward:
                    return outputs
                pairs = zip(outputs, gradients, strict=False)  # of the first outputs, where fewer
                asked = [(output, dy) for output, dy in pairs if output.requires_grad]
                results, upstream = zip(*asked, strict=True)
                return [*outputs, *torch.autograd.grad(results, leaves, upstream)]

            return work

        return make


class Judge:
    """Compares functions with PyTorch's reference and with it in fp64, which are computed once."""

    def __init__(self, trial: Trial, whole: Trial | None = None):
        """`whole`: the same pass of whole numbers, for functions that must have them to the bit."""
        self.trial, self.whole = trial, whole
        self._kept: dict[tuple[bool, bool, int], list[Tensor]] = {}

    def wrong(self, function: Callable, to_the_bit: bool = False) -> str:
        """What `function` computes otherwise than it should; empty where nothing."""
        made = self.trial.maker(function)()()
        for name, number, count in self._names(made):
            torchs = self._right(self.trial, False, count)[number]
            why = refusal(made[number], torchs, self._right(self.trial, True, count)[number])
            if why:
                return f"{name} {why}"
        if not to_the_bit or self.whole is None:
            return ""
        made = self.whole.maker(function)()()
        for name, number, count in self._names(made):
            if why := missed(made[number], self._right(self.whole, True, count)[number]):
                return f"of whole numbers {name} {why}"
        return ""

    def _names(self, made: list[Tensor]) -> list[tuple[str, int, int]]:
        """Each result's name and number, and how many outputs there are before gradients."""
        trained = self.trial.case.trained if self.trial.backward else ()
        count = len(made) - len(trained)
        names = [f"output {number}" for number in range(count)]
        names += [f"gradient of {name}" for name in trained]
        return [(name, number, count) for number, name in enumerate(names)]

    def _right(self, trial: Trial, exact: bool, count: int) -> list[Tensor]:
        key = trial is self.trial, exact, count
        if key not in self._kept:
            of = trial.exact() if exact else trial
            self._kept[key] = of.maker(trial.case.reference, count)()()
        return self._kept[key]


def whole(memory: Memory) -> Memory:
    """As `memory`, of small whole numbers."""
    return replace(memory, whole=True)


def _wide(value: object) -> object:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value
