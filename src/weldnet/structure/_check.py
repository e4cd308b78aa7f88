"""The check: a random renumbering of what the structure allows must leave the output as it was."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weldnet.errors import ModelError, StructureError
from weldnet.structure._move import renumber
from weldnet.structure._spec import Structure
from weldnet.structure._trace import Operation, Trace, call, output_tensors, trace

__all__ = ["Check", "Referee", "check", "random_renumbering"]

#: Allowed relative change of the output in float64, and where the model itself computes in lower precision.
TOLERANCE = 1e-9
LOW_PRECISION_TOLERANCE = 1e-4


@final
@dataclass(frozen=True)
class Check:
    """What a passed check saw.

    Args:
        error: largest relative change of the output over all renumberings.
        tolerance: what was allowed.
        renumberings: how many were tried, on how many inputs each.
        inputs: the example input and random ones of its shapes.
    """

    error: float
    tolerance: float
    renumberings: int
    inputs: int

    def __str__(self) -> str:
        return (
            f"passed: {self.renumberings} random renumberings on {self.inputs} inputs change the output by at most "
            f"{self.error:.1e} (relative, {self.tolerance:.0e} allowed)"
        )


def check(model: nn.Module, example_input: Any, structure: Structure, *, seed: int = 0) -> Check:
    """Renumber all spaces at once and one by one, on the real weights, and compare outputs in float64.

    Args:
        model: not changed; a copy runs in eval mode.
        example_input: as for :func:`weldnet.capture`; random inputs of the same shapes are tried too.
        structure: what to test.
        seed: of the renumberings and the random inputs.

    Returns:
        The largest error seen.

    Raises:
        StructureError: a renumbering changed the output; names the first space and the first tensor.
        ModelError: the model fails on the input.
    """
    generator = torch.Generator().manual_seed(seed)
    referee = Referee(model, example_input, generator)
    state = referee.state
    worst, tried = 0.0, 0
    together = [random_renumbering(structure, generator) for _ in range(2)]
    alone = [_only(structure, root.name, together[0]) for root in structure.roots]
    for sources in [*together, *alone]:
        error = referee.error(renumber(state, structure, sources))
        tried += 1
        if not error <= referee.tolerance:
            raise StructureError(_blame(referee, structure, sources, error))
        worst = max(worst, error)
    return Check(worst, referee.tolerance, tried, len(referee.inputs))


def random_renumbering(structure: Structure, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw an integer source for every space; nested spaces keep to their parent's blocks."""
    sources: dict[str, Tensor] = {}
    for space in structure.spaces:
        if space.parent is None:
            sources[space.name] = torch.randperm(space.size, generator=generator)
        else:
            blocks = sources[space.parent].tolist()
            inside = [b * space.block + torch.randperm(space.block, generator=generator) for b in blocks]
            sources[space.name] = torch.cat(inside)
    return sources


class Referee:
    """A float64 copy of a model with some inputs and what it answers to them."""

    def __init__(self, model: nn.Module, example_input: Any, generator: torch.Generator) -> None:
        self.model, double = _in_double(model, example_input)
        self.state = {k: t for k, t in self.model.state_dict().items() if isinstance(t, Tensor)}
        random = _random_like(double, generator)
        self.tolerance = TOLERANCE if _stays_double(self.model, double) else LOW_PRECISION_TOLERANCE
        answers = [output_tensors(call(self.model, self.state, x)) for x in (double, random)]
        if not _finite(answers[0]):
            raise StructureError(
                f"{type(model).__name__} answers with NaN or Inf on the example input: the check can prove nothing; "
                "give an input in the range that the model was trained on"
            )
        # A model may have no answer to random inputs (a logarithm, say); then the example has to do.
        self.inputs = [double, random] if _finite(answers[1]) else [double]
        self._answers = answers[: len(self.inputs)]

    def error(self, state: Mapping[str, Tensor]) -> float:
        """Return the largest relative change of the outputs with ``state`` in place of the model's own."""
        worst = 0.0
        for x, answer in zip(self.inputs, self._answers, strict=True):
            for now, before in zip(output_tensors(call(self.model, state, x)), answer, strict=True):
                if before.numel():
                    change = float((now.double() - before.double()).abs().max())
                    worst = max(worst, change / max(float(before.double().abs().max()), 1e-300) if change else 0.0)
                    if change != change:
                        return float("nan")
        return worst


def _in_double(model: nn.Module, example_input: Any) -> tuple[nn.Module, Any]:
    """Copy a model and its input to float64 on the CPU, or leave their precision where the model insists on it."""
    twin = copy.deepcopy(model).eval().cpu()
    at_home = pytree.tree_map_only(Tensor, lambda t: t.detach().cpu(), example_input)
    double = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, at_home)
    try:
        call(twin.double(), None, double)
        return twin, double
    except ModelError:
        call(model, None, example_input)  # not a matter of precision: let the model's own error out
        return copy.deepcopy(model).eval().cpu(), at_home


def _stays_double(model: nn.Module, example_input: Any) -> bool:
    low = {torch.float32, torch.float16, torch.bfloat16}
    return not any(ref.dtype in low for op in trace(model, example_input).operations for ref in op.outputs)


def _random_like(example_input: Any, generator: torch.Generator) -> Any:
    def draw(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=t.dtype) if t.is_floating_point() else t

    return pytree.tree_map_only(Tensor, draw, example_input)


def _finite(answer: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in answer)


def _only(structure: Structure, root: str, sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {space.name for space in structure.tree(root)}
    return {name: source for name, source in sources.items() if name in names}


# -- naming what is wrong ----------------------------------------------------------------------------


def _blame(referee: Referee, structure: Structure, sources: Mapping[str, Tensor], error: float) -> str:
    """Find the first space whose renumbering alone shows the fault, and the first tensor that no longer fits."""
    culprit, shown = "all spaces together", sources
    for root in structure.roots:
        alone = _only(structure, root.name, sources)
        if alone and not referee.error(renumber(referee.state, structure, alone)) <= referee.tolerance:
            culprit, shown = f"space {root.name!r}", alone
            break
    moved = {place.tensor for place in structure.places if place.space in shown}
    tensor, where = _first_misfit(referee, renumber(referee.state, structure, shown), moved)
    return (
        f"{culprit}: renumbering it changes the output by {error:.1e} (relative, {referee.tolerance:.0e} allowed); the "
        f"first tensor that no longer fits is {tensor} (at {where}); the structure is wrong for this model: "
        "capture it again from this very model, and report the model if that does not help"
    )


def _first_misfit(referee: Referee, state: Mapping[str, Tensor], moved_names: Container[str]) -> tuple[str, str]:
    """Compare the two forward passes operation by operation: renumbering may only reorder what each one gives."""
    moved = copy.deepcopy(referee.model)
    moved.load_state_dict(dict(state))
    before = trace(referee.model, referee.inputs[-1], keep_values=True)
    after = trace(moved, referee.inputs[-1], keep_values=True)
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
