"""Inner products of units over bricks: the fast way to the scores that most methods ask for.

A pair needs, for one side of a brick, one product to carry the other side and one to compare with the anchor. More
networks are compared with the sum of all others in the universe: a running sum of one brick's size, kept from visit to
visit, so that a visit reads each network once and the cost is linear in their number. For networks on disk the sums lie
in a `Spill`, and what was read of a network is read again when it has moved, so that one tensor is held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weldnet.alignment._rough import Multiply, Rough, in_float32
from weldnet.alignment._seen import State, mark_in
from weldnet.structure import Brick, Place

__all__ = ["BrickPool", "Totals"]

#: Returns one network's values of a tensor.
Read = Callable[[str, int], Tensor]


@dataclass
class Totals:
    """For every brick the sum over all networks of what they hold there, in the universe; made when it is asked for.

    Args:
        read: one network's values of a tensor.
        sums: where they are kept.
    """

    read: Read
    sums: MutableMapping[Brick, Tensor] = field(default_factory=dict[Brick, Tensor])
    _states: dict[Brick, list[State]] = field(default_factory=dict[Brick, list[State]])

    def of(self, brick: Brick, couplings: Mapping[str, Tensor]) -> Tensor:
        """Return the sum; made anew if a coupling has changed and :meth:`move` was not told."""
        if self._states.get(brick) == _states(brick, couplings):
            return self.sums[brick]
        # Changes are added to views of the sum, which only a contiguous tensor has.
        total = brick.cut(self.read(brick.tensor, 0)).clone(memory_format=torch.contiguous_format)
        for k in range(1, 1 + len(couplings[brick.left.space])):
            moved = brick.cut(self.read(brick.tensor, k))
            if brick.right is not None:
                moved = _carry(moved, couplings[brick.right.space][k - 1], left=False)
            total.add_(_carry(moved, couplings[brick.left.space][k - 1], left=True))
        self.sums[brick] = total
        self._states[brick] = _states(brick, couplings)
        return total

    def move(self, brick: Brick, moved: Tensor, change: tuple[Tensor, Tensor], *, left: bool) -> None:
        """Take in that a network has got another coupling on one side.

        Args:
            brick: where.
            moved: the network's brick, carried on the other side.
            change: the coupling before and now.
            left: which side.
        """
        total, (old, new) = self.sums[brick], change
        if new.dtype == torch.int64:
            total.sub_(_carry(moved, old, left=left)).add_(_carry(moved, new, left=left))
        elif left:
            total.flatten(1).addmm_((new - old).T, moved.flatten(1))
        else:
            total.flatten(0, 1).addmm_(moved.flatten(0, 1), new - old)
        self.sums[brick] = total

    def settle(self, brick: Brick, couplings: Mapping[str, Tensor]) -> None:
        """Say that all changes of the couplings were told."""
        self._states[brick] = _states(brick, couplings)

    def forget(self) -> None:
        """Make all sums anew when they are asked for: they then depend on nothing but the couplings."""
        self.sums.clear()
        self._states.clear()


@dataclass
class BrickPool:
    """Scores of one place; see :class:`weldnet.affinity.Pool`.

    Args:
        place: whose units are compared.
        bricks: all that have the place on one side.
        couplings: of all networks but the anchor, by space; always the latest.
        read: one network's values of a tensor.
        totals: sums over the networks; None for a pair.
        before: a network's coupling when its scores were last asked for; all places of a space share it.
        hold: keep what was read for the scores until the coupling that follows from them is known, or read it again.
        rough: products in less than float32 for the scores, if they are wanted.
    """

    place: Place
    bricks: Sequence[Brick]
    couplings: Mapping[str, Tensor]
    read: Read
    totals: Totals | None = None
    before: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    hold: bool = True
    rough: Rough | None = None
    _found: list[Tensor] = field(default_factory=list[Tensor])

    def scores(self, k: int) -> Tensor:
        """Return the inner products of network ``k``'s units with the universe's."""
        return self.checked_scores(k, None)[0]

    def checked_scores(self, k: int, units: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the scores, and those of some units in float32, shape (some, universe); couplings are soft then."""
        own = self.couplings[self.place.space][k - 1]
        result: Tensor | None = None
        expected: Tensor | None = None
        self._found = []
        for brick in self.bricks:
            part, left = self._part(brick, k), self.place is brick.left
            moved = self._across(brick, part, k)
            if self.totals is None:
                whole = rest = self._part(brick, 0)
            else:
                whole = self.totals.of(brick, self.couplings)
                rest = _without(whole, moved, own, self._multiply, left=left)
                self._found += [moved] if self.hold else []
            found = self._multiply(_rows(moved, left=left), _rows(rest, left=left).T)
            result = found if result is None else result.add_(found)
            if units is not None:
                some = self._some(brick, part, whole, k, units)
                expected = some if expected is None else expected.add_(some)
        if self.totals is not None and not torch.equal(self.before.get(k, own[:0]), own):
            self.before.clear()
            self.before[k] = own.clone()
        assert result is not None
        return result, expected

    def _some(self, brick: Brick, part: Tensor, whole: Tensor, k: int, units: Tensor) -> Tensor:
        assert self.rough is not None
        left, multiply = self.place is brick.left, self.rough.check
        some = self._across(brick, part.index_select(0 if left else 2, units), k, exact=True)
        found = multiply(_rows(some, left=left), _rows(whole, left=left).T)
        if self.totals is None:
            return found
        # Less the network's own share: what is compared is brought back, not all of it.
        back = self._across(brick, some, k, exact=True, back=True)
        shared = multiply(_rows(back, left=left), _rows(part, left=left).T)
        return multiply(shared, self.couplings[self.place.space][k - 1], found)

    def replace(self, k: int, coupling: Tensor, rows: Tensor | None = None) -> None:
        """Take in the coupling that network ``k`` has got since its scores were asked for."""
        if self.totals is None:
            return
        assert k in self.before, "a coupling follows from scores"
        for number, brick in enumerate(self.bricks):
            moved = self._found[number] if self._found else self._across(brick, self._part(brick, k), k)
            self.totals.move(brick, moved, (self.before[k], coupling), left=self.place is brick.left)
            self.totals.settle(brick, self.couplings)
        self._found = []

    def _part(self, brick: Brick, k: int) -> Tensor:
        return brick.cut(self.read(brick.tensor, k))

    @property
    def _multiply(self) -> Multiply:
        return in_float32 if self.rough is None else self.rough.multiply

    def _across(self, brick: Brick, part: Tensor, k: int, *, exact: bool = False, back: bool = False) -> Tensor:
        """Carry network ``k``'s brick, or a part of it, on the side away from the place; ``back``: the other way."""
        if (other := brick.other(self.place)) is None:
            return part
        coupling = self.couplings[other.space][k - 1]
        multiply = self.rough.check if exact and self.rough is not None else self._multiply
        return _carry(part, coupling.T if back else coupling, multiply, left=other is brick.left)


def _rows(brick: Tensor, *, left: bool) -> Tensor:
    """One row for every unit of a side."""
    return brick.flatten(1) if left else brick.flatten(0, 1).T


def _carry(part: Tensor, coupling: Tensor, multiply: Multiply = in_float32, *, left: bool) -> Tensor:
    """Carry one side of a brick along integer sources or a soft matrix."""
    if coupling.dtype == torch.int64:
        return part.index_select(0 if left else 2, coupling)
    if left:
        return multiply(coupling.T, part.flatten(1)).view(part.shape)
    return multiply(part.flatten(0, 1), coupling).view(part.shape)


def _without(total: Tensor, moved: Tensor, coupling: Tensor, multiply: Multiply, *, left: bool) -> Tensor:
    """Return the sum of the other networks: the total less what one network adds to it."""
    if coupling.dtype == torch.int64:
        return total - _carry(moved, coupling, left=left)
    if left:
        return multiply(coupling.T, moved.flatten(1), total.flatten(1)).view(total.shape)
    return multiply(moved.flatten(0, 1), coupling, total.flatten(0, 1)).view(total.shape)


def _states(brick: Brick, couplings: Mapping[str, Tensor]) -> list[State]:
    return [mark_in(couplings, place.space) for place in (brick.left, brick.right) if place is not None]
