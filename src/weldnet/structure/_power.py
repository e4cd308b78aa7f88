"""Power: would the check notice if a tensor were forgotten?"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn

from weldnet._modules import bare
from weldnet._words import counted
from weldnet.errors import ModelError, StructureError
from weldnet.structure._copies import own_copy, own_inputs
from weldnet.structure._live import draw_floats, draw_integers, enliven
from weldnet.structure._move import renumber
from weldnet.structure._referee import Referee, blame, require_fit
from weldnet.structure._spec import Structure

__all__ = ["Power", "live_referee", "power"]

#: A tensor below this power, or below what the check allows, is one for which the check proves nothing.
EVIDENCE = 1e-6

#: How often the parameters are drawn, for tensors that did not show: an expert may not have been asked.
ATTEMPTS = 3

#: Sizes of the random weights, tried until the model answers with finite numbers.
GAINS = (1.0, 0.3, 0.1)


@final
@dataclass(frozen=True)
class Power:
    """How much evidence a passed check holds, tensor by tensor.

    Args:
        by_tensor: for every moved tensor the relative change of the output if it alone is left as it was.
        deaf: tensors that cannot show, since the output does not depend on them: a key's bias, which softmax does
            not see, or a bias that the norm after it subtracts.
        error: largest relative change of the output by renumberings of everything, with live activations.
        tolerance: what was allowed.
        renumberings: how many of everything were tried.
    """

    by_tensor: Mapping[str, float]
    deaf: tuple[str, ...]
    error: float
    tolerance: float
    renumberings: int

    @cached_property
    def silent(self) -> tuple[str, ...]:
        """The tensors for which the check proves nothing, although the output depends on them."""
        least = max(EVIDENCE, self.tolerance)
        return tuple(name for name, value in self.by_tensor.items() if value <= least and name not in self.deaf)

    @cached_property
    def weakest(self) -> tuple[str, float] | None:
        """The tensor with the least power, deaf ones aside, and that power; None if nothing was moved."""
        heard = [(name, value) for name, value in self.by_tensor.items() if name not in self.deaf]
        return min(heard, key=lambda entry: entry[1], default=None)

    @property
    def share(self) -> float:
        """The share of the moved tensors, deaf ones aside, that have a power above 1e-6."""
        values = [value for name, value in self.by_tensor.items() if name not in self.deaf]
        return sum(value > EVIDENCE for value in values) / len(values) if values else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {
            "by_tensor": dict(self.by_tensor),
            "weakest": self.weakest and self.weakest[0],
            "share": self.share,
            "silent": list(self.silent),
            "deaf": list(self.deaf),
            "error": self.error,
            "tolerance": self.tolerance,
            "renumberings": self.renumberings,
        }

    def __str__(self) -> str:
        if self.weakest is None:
            return "no evidence: no tensor was moved"
        name, value = self.weakest
        lines = [
            f"weakest evidence: {name!r} {value:.1e} (power), "
            f"{len(self.silent)} of {counted(len(self.by_tensor), 'tensor')} without evidence"
        ]
        if self.silent:
            lines.append(f"  the check proves nothing for {_some(self.silent)}")
        if self.deaf:
            lines.append(f"  the output does not depend on {_some(self.deaf)}")
        return "\n".join(lines)


def power(model: nn.Module, example_input: Any, structure: Structure, *, seed: int = 0) -> Power:
    """Measure what a passed :func:`weldnet.check` proves: leave one tensor unmoved, and see whether the output changes.

    On the real weights a forgotten tensor may not show: its units are dead, or its values all zero, as biases are
    before training. So the parameters of a float64 copy are drawn anew such that activations live; there, renumbering
    everything must still keep the output. Then everything is moved but one tensor, for each tensor: its power is the
    relative change of the output. That takes one forward pass a tensor.

    Args:
        model: not changed.
        example_input: as for :func:`weldnet.capture`; random values of the same shapes are used.
        structure: what is tested.
        seed: of everything random.

    Returns:
        The power of every moved tensor.

    Raises:
        StructureError: a renumbering changed the output; names the first space and the first tensor.
        ModelError: the model fails on the input.

    Example:
        >>> import torch, weldnet
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> found = weldnet.power(net, torch.zeros(1, 4), weldnet.capture(net, torch.zeros(1, 4)))
        >>> sorted(found.by_tensor), found.silent
        (['0.bias', '0.weight', '2.weight'], ())
    """
    require_fit(structure, bare(model).state_dict(), type(model).__name__)
    generator = torch.Generator().manual_seed(seed)
    moved = tuple(dict.fromkeys(place.tensor for place in structure.places))
    found = dict.fromkeys(moved, 0.0)
    deaf: set[str] = set(moved)
    worst, tried, tolerance = 0.0, 0, 0.0
    for _ in range(ATTEMPTS):
        referee = live_referee(model, example_input, structure, generator)
        tolerance = referee.tolerance
        sources = _moving(structure, generator)
        for drawn in (sources, _moving(structure, generator)):
            error = referee.error(renumber(referee.state, structure, drawn))
            if not error <= tolerance:
                raise StructureError(blame(referee, structure, drawn, error))
            worst, tried = max(worst, error), tried + 1
        least = max(EVIDENCE, tolerance)
        _measure(referee, structure, sources, found, [n for n in moved if found[n] <= least])
        noise = min(tolerance, 10 * max(worst, 1e-12))
        deaf = {n for n in deaf if found[n] <= least and _rescaled(referee, structure, n, generator) <= noise}
        if all(value > least for value in found.values()):
            break
    return Power(found, tuple(n for n in moved if n in deaf), worst, tolerance, tried)


def live_referee(model: nn.Module, example_input: Any, structure: Structure, generator: torch.Generator) -> Referee:
    """Return a referee of the model with live activations, at the largest gain at which it answers in numbers.

    Raises:
        StructureError: it answers with NaN or Inf at every gain.
        ModelError: the model fails on the input.
    """
    failure: StructureError | None = None
    moved = frozenset(place.tensor for place in structure.places)
    example = draw_integers(own_copy(bare(model)), own_inputs(example_input), generator)
    # A model may have no answer to random inputs (a logarithm, say); then the example has to do.
    for x, gain in itertools.product((draw_floats(example, generator), example), GAINS):

        def prepare(twin: nn.Module, x: Any, gain: float = gain) -> None:
            enliven(twin, x, moved, generator, gain=gain)

        try:
            return Referee(model, x, generator, structure.outputs, prepare=prepare)
        except StructureError as error:
            failure = error
    raise StructureError(
        f"{type(model).__name__} answers with NaN or Inf on random weights: its power cannot be measured; "
        "leave that out (--no-power)"
    ) from failure


def _moving(structure: Structure, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw a source for every space in which no unit stays, unless it is alone."""
    sources: dict[str, Tensor] = {}
    for space in structure.spaces:
        if space.parent is None:
            sources[space.name] = _cycle(space.size, generator)
        else:
            inside = [b * space.block + _cycle(space.block, generator) for b in sources[space.parent].tolist()]
            sources[space.name] = torch.cat(inside)
    return sources


def _cycle(size: int, generator: torch.Generator) -> Tensor:
    """Return one random cycle through all numbers below ``size``."""
    order = torch.randperm(size, generator=generator)
    source = torch.empty_like(order)
    source[order] = order.roll(1)
    return source


def _measure(
    referee: Referee,
    structure: Structure,
    sources: Mapping[str, Tensor],
    found: dict[str, float],
    names: Iterable[str],
) -> None:
    """Raise each named tensor's entry in ``found`` to what leaving it unmoved changes."""
    whole = renumber(referee.state, structure, sources)
    for name in names:
        found[name] = max(found[name], _change(referee, {**whole, **_with(structure, name, referee.state[name])}))


def _rescaled(referee: Referee, structure: Structure, name: str, generator: torch.Generator) -> float:
    """Return the change of the output when every value of a tensor is rescaled: none if nothing depends on it."""
    tensor = referee.state[name]
    noise = 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    other = (tensor.double() * noise).to(tensor.dtype)
    return _change(referee, {**referee.state, **_with(structure, name, other)})


def _with(structure: Structure, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return a tensor under all its names."""
    return dict.fromkeys((name, *(a for a, shared in structure.aliases.items() if shared == name)), tensor)


def _change(referee: Referee, state: Mapping[str, Tensor]) -> float:
    """Return the change of the output on the last input; what breaks the model surely shows."""
    try:
        error = referee.change(state)
    except ModelError:
        return float("inf")
    return error if error == error else float("inf")


def _some(names: tuple[str, ...], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
