"""What was scored before and still holds: scores of a pair depend only on the couplings of neighbouring spaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from weldnet.alignment._shelf import Shelf
from weldnet.structure import Place

__all__ = ["Mark", "Seen", "State", "mark", "mark_in"]


@dataclass(frozen=True, eq=False)
class Mark:
    """A tensor as it is now: equal to a later mark of the same tensor if nothing was written into it since."""

    tensor: Tensor
    version: int | None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mark) or self.tensor is not other.tensor:
            return False
        return self.version is not None and self.version == other.version

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def mark(tensor: Tensor) -> Mark:
    """Mark a tensor; torch counts the writes, but for tensors made in inference mode, whose marks never equal."""
    return Mark(tensor, None if tensor.is_inference() else tensor._version)


#: Equal to a later one if the tensor is unchanged since.
State = Mark | int


def mark_in(kept: Mapping[str, Tensor], name: str) -> State:
    """Mark a tensor that is kept by name; a shelf counts what is put onto it, and the mark then holds no tensor."""
    return kept.version(name) if isinstance(kept, Shelf) else mark(kept[name])


@dataclass
class _Part:
    members: tuple[Place, ...]
    marks: Mapping[Place, list[State]]
    scores: Tensor


@dataclass
class Seen:
    """Sums of scores that one space had at earlier visits, with what they depended on.

    Annealing visits spaces up and down in turn, so that at every visit only one neighbour of a space in a chain is new:
    what depends on the other one, about half, is known.
    """

    parts: list[_Part] = field(default_factory=list)

    def total(self, marks: Mapping[Place, list[State]], score: Callable[[Sequence[Place]], Tensor]) -> Tensor:
        """Return the sum of the scores of all members.

        Args:
            marks: of what the scores of each member depend on, as it is now.
            score: computes the sum over some members.
        """
        missing = [member for member in marks if not any(member in part.members for part in self.parts)]
        # What still holds and what does not part ways here: next time it will again.
        groups = [[m for m in missing if not marks[m]], [m for m in missing if marks[m]]]
        for part in self.parts:
            fresh = [m for m in part.members if part.marks[m] == marks[m]]
            if len(fresh) < len(part.members):
                groups += [fresh, [m for m in part.members if m not in fresh]]
        self.parts = [p for p in self.parts if all(p.marks[m] == marks[m] for m in p.members)]
        for group in filter(None, groups):
            self.parts.append(_Part(tuple(group), {m: marks[m] for m in group}, score(group)))
        total = self.parts[0].scores.clone()
        for part in self.parts[1:]:
            total.add_(part.scores)
        return total
