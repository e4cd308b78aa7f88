"""The referee: what a model answers, with which of its tensors moved, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weldnet._modules import bare, forget_cached
from weldnet.errors import ModelError, StructureError
from weldnet.structure._copies import named_tensors, own_copy, own_inputs, tie
from weldnet.structure._live import draw_floats
from weldnet.structure._meta import has_weights
from weldnet.structure._move import renumber
from weldnet.structure._outputs import output_tensors
from weldnet.structure._spec import Structure
from weldnet.structure._trace import Operation, Trace, call, trace

__all__ = [
    "LOW_PRECISION_TOLERANCE",
    "TOLERANCE",
    "Referee",
    "allowed",
    "blame",
    "only",
    "relative_change",
    "stays_double",
]

#: Allowed relative change of the output in float64, and where the model itself computes in lower precision.
TOLERANCE = 1e-9
LOW_PRECISION_TOLERANCE = 1e-4

#: Changes a private copy of the model, given the input, before it is asked anything.
Prepare = Callable[[nn.Module, Any], None]


class Referee:
    """A float64 copy of a model with some inputs and what it answers to them.

    Args:
        model: not changed.
        example_input: as for :func:`weldnet.capture`.
        generator: draws the random inputs.
        outputs: key paths of what counts as output, as for :func:`weldnet.capture`; a structure has them.
        prepare: changes the copy before it is asked anything.

    Raises:
        ModelError: the model fails on the input, has no such output, or no weights.
        StructureError: it answers with NaN or Inf.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Any,
        generator: torch.Generator,
        outputs: str | Sequence[str] | None = None,
        *,
        prepare: Prepare | None = None,
    ) -> None:
        if not has_weights(model):
            raise ModelError(f"{type(model).__name__} has no weights (meta device): load them first, then check it")
        self.outputs = outputs
        self.model, double = _in_double(bare(model), example_input)
        if prepare is not None:
            prepare(self.model, double)
        self.state = {k: t for k, t in self.model.state_dict().items() if isinstance(t, Tensor)}
        random = draw_floats(double, generator)
        self.tolerance = TOLERANCE if stays_double(self.model, double, outputs) else LOW_PRECISION_TOLERANCE
        answers = [self._answer(self.state, x) for x in (double, random)]
        if not _finite(answers[0]):
            raise StructureError(
                f"{type(model).__name__} answers with NaN or Inf on the example input: the check can prove nothing; "
                "give an input in the range that the model was trained on"
            )
        # A model may have no answer to random inputs (a logarithm, say); then the example has to do.
        self.inputs = [double, random] if _finite(answers[1]) else [double]
        self._answers = answers[: len(self.inputs)]

    def error(self, state: Mapping[str, Tensor]) -> float:
        """Return the largest relative change of the outputs, on all inputs, with ``state`` in place of the model's own.

        NaN if there is a NaN in them.
        """
        return _worst(self.change(state, index) for index in range(len(self.inputs)))

    def error_of(self, other: nn.Module) -> float:
        """Return the largest relative difference between the outputs of another model and the own ones, on all inputs.

        Args:
            other: takes and gives the same, in the precision of :attr:`model`; its own tensors count.

        Raises:
            ModelError: it fails on an input, or answers in other shapes.
        """
        answers = [output_tensors(call(other.eval(), None, x), self.outputs) for x in self.inputs]
        for now, before in zip(answers, self._answers, strict=True):
            if [t.shape for t in now] != [t.shape for t in before]:
                raise ModelError(f"{type(other).__name__} answers in other shapes; a width is written into it")
        return _worst(relative_change(now, before) for now, before in zip(answers, self._answers, strict=True))

    def change(self, state: Mapping[str, Tensor], index: int = -1) -> float:
        """Return the largest relative change of the outputs on one input, as :meth:`error`."""
        return relative_change(self._answer(state, self.inputs[index]), self._answers[index])

    def _answer(self, state: Mapping[str, Tensor], x: Any) -> list[Tensor]:
        forget_cached(self.model)
        return output_tensors(call(self.model, state, x), self.outputs)


def relative_change(answers: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest change of some outputs, relative to the largest number in each; NaN if there is a NaN."""
    worst = 0.0
    for now, before in zip(answers, expected, strict=True):
        if before.numel():
            change = float((now.double() - before.double()).abs().max())
            worst = max(worst, change / max(float(before.double().abs().max()), 1e-300) if change else 0.0)
            if change != change:
                return float("nan")
    return worst


def _worst(changes: Iterable[float]) -> float:
    found = list(changes)
    return max(found) if all(change == change for change in found) else float("nan")


def _in_double(model: nn.Module, example_input: Any) -> tuple[nn.Module, Any]:
    """Copy a model and its input to float64 on the CPU, or leave their precision where the model insists on it."""
    twin, single = own_copy(model), own_inputs(example_input)
    _, aliases = named_tensors(model)
    double = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, single)
    try:
        call(twin.double(), None, double)
    except ModelError:
        call(own_copy(model), None, single)  # not a matter of precision: let the model's own error out
        twin, double = own_copy(model), single
    tie(twin, aliases)
    return twin, double


def stays_double(model: nn.Module, example_input: Any, outputs: str | Sequence[str] | None) -> bool:
    """Whether no operation of a model computes in lower precision than float64."""
    low = {torch.float32, torch.float16, torch.bfloat16}
    return not any(ref.dtype in low for op in trace(model, example_input, outputs).operations for ref in op.outputs)


def _finite(answer: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in answer)


def only(structure: Structure, root: str, sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep the sources of one root space and of what is nested in it."""
    names = {space.name for space in structure.tree(root)}
    return {name: source for name, source in sources.items() if name in names}


def allowed(tolerance: float) -> str:
    """Say what was allowed, and why it is more than usual.

    >>> allowed(1e-9)
    'relative, 1e-09 allowed'
    """
    why = "" if tolerance == TOLERANCE else ", as the model computes in lower precision than float64"
    return f"relative, {tolerance:.0e} allowed{why}"


# -- naming what is wrong ----------------------------------------------------------------------------


def blame(referee: Referee, structure: Structure, sources: Mapping[str, Tensor], error: float) -> str:
    """Find the first space whose renumbering alone shows the fault, and the first tensor that no longer fits."""
    culprit, shown = "all spaces together", sources
    for root in structure.roots:
        alone = only(structure, root.name, sources)
        if alone and not referee.error(renumber(referee.state, structure, alone)) <= referee.tolerance:
            culprit, shown = f"space {root.name!r}", alone
            break
    moved = {place.tensor for place in structure.places if place.space in shown}
    tensor, where = _first_misfit(referee, renumber(referee.state, structure, shown), moved)
    return (
        f"{culprit}: renumbering it changes the output by {error:.1e} ({allowed(referee.tolerance)}); the "
        f"first tensor that no longer fits is {tensor} (at {where}); the structure is wrong for this model: "
        "capture it again from this very model, and report the model if that does not help"
    )


def _first_misfit(referee: Referee, state: Mapping[str, Tensor], moved_names: Container[str]) -> tuple[str, str]:
    """Compare the two forward passes operation by operation: renumbering may only reorder what each one gives."""
    moved = copy.deepcopy(referee.model)
    moved.load_state_dict(dict(state))
    before = trace(referee.model, referee.inputs[-1], referee.outputs, keep_values=True)
    after = trace(moved, referee.inputs[-1], referee.outputs, keep_values=True)
    holders = _holders(before)
    last = "the output"
    for op, old, new in zip(before.operations, before.values, after.values, strict=False):
        named = [holders[ref.number] for ref in op.inputs if ref.number in holders]
        if named:  # an operation shows only that its tensors do not fit together: those that moved come first
            last = " or ".join(repr(name) for name in sorted(named, key=lambda name: name not in moved_names))
        if not _same_values(old, new):
            return last, op.name
    return last, "the order of the outputs"


def _holders(traced: Trace) -> dict[int, str]:
    """Which tensors of a trace are parameters, or a parameter seen in another shape."""
    holders = {ref.number: name for name, ref in traced.tensors.items()}
    for op in traced.operations:
        sole = op.inputs
        if len(sole) == 1 and sole[0].number in holders and _is_view(op):
            holders.update({ref.number: holders[sole[0].number] for ref in op.outputs})
    return holders


def _is_view(op: Operation) -> bool:
    return any(argument.alias_info is not None for argument in op.func._schema.arguments)


def _same_values(old: Iterable[Tensor], new: Iterable[Tensor]) -> bool:
    for a, b in zip(old, new, strict=True):
        if a.shape != b.shape:
            return False
        x, y = a.double().flatten().sort().values, b.double().flatten().sort().values
        if not torch.allclose(x, y, rtol=1e-6, atol=1e-9 * float(x.abs().max()) if x.numel() else 0.0):
            return False
    return True


def require_fit(structure: Structure, state: Mapping[str, Tensor], model: str) -> None:
    """Refuse a structure that was captured from another model.

    Raises:
        StructureError: a tensor of the structure is missing or has another shape.
    """
    for name, shape in structure.shapes.items():
        found = tuple(state[name].shape) if name in state else None
        if found != tuple(shape):
            has = f"there it has shape {found}" if found is not None else "which has no such tensor"
            raise StructureError(
                f"the structure lists {name!r} of shape {tuple(shape)}, but was given with {model}: {has}; "
                "capture the structure of this very model"
            )
