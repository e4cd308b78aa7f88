"""The check: a random renumbering of what the structure allows must leave the output as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from weldnet._modules import bare
from weldnet._words import counted
from weldnet.errors import StructureError
from weldnet.structure._move import renumber
from weldnet.structure._referee import Referee, allowed, blame, only, require_fit
from weldnet.structure._spec import Structure

__all__ = ["Check", "check", "random_renumbering"]


@final
@dataclass(frozen=True)
class Check:
    """What a passed check saw.

    Args:
        error: largest relative change of the output over all renumberings.
        tolerance: what was allowed.
        renumberings: how many were tried, on how many inputs each; 0 if there is nothing to renumber.
        inputs: the example input and random ones of its shapes.
    """

    error: float
    tolerance: float
    renumberings: int
    inputs: int

    def __str__(self) -> str:
        if not self.renumberings:
            return "nothing to renumber: the structure has no spaces (weldnet inspect shows why), so nothing is proved"
        change = "changes" if self.renumberings == 1 else "change"
        return (
            f"passed: {counted(self.renumberings, 'random renumbering')} on {counted(self.inputs, 'input')} {change} "
            f"the output by at most {self.error:.1e} ({allowed(self.tolerance)})"
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
    require_fit(structure, bare(model).state_dict(), type(model).__name__)
    referee = Referee(model, example_input, generator, structure.outputs)
    state = referee.state
    worst, tried = 0.0, 0
    together = [random_renumbering(structure, generator) for _ in range(2 if structure.spaces else 0)]
    alone = [only(structure, root.name, together[0]) for root in structure.roots]
    for sources in [*together, *alone]:
        error = referee.error(renumber(state, structure, sources))
        tried += 1
        if not error <= referee.tolerance:
            raise StructureError(blame(referee, structure, sources, error))
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
