"""The structure of a model as data: spaces, places, frozen axes. Frozen, self-checking, JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from weldnet.errors import StructureError

__all__ = ["Frozen", "Layout", "Place", "Role", "Space", "Structure"]

Indices = NDArray[np.int64]

#: What a tensor does with the units on one of its axes.
Role = Literal["writes", "reads", "both"]

#: Reasons that belong to the problem itself rather than to what weldnet can see; they do not count
#: as hidden units that might have been free.
BOUNDARY_REASONS = frozenset({"network input", "network output", "kernel position"})


@final
@dataclass(frozen=True)
class Layout:
    """Which positions of an axis belong to which unit: ``offset + unit * stride + copy * step``.

    Flattening C channels of h x w pixels gives ``Layout(0, stride=h*w, copies=h*w, step=1)``; the second half
    of a concatenation gives an offset. Anything irregular is a ``table`` of shape (units, copies).
    """

    offset: int = 0
    stride: int = 1
    copies: int = 1
    step: int = 1
    table: tuple[tuple[int, ...], ...] | None = None

    def positions(self, units: int) -> Indices:
        """Return the positions of every unit, shape (units, copies)."""
        if self.table is not None:
            return np.array(self.table, dtype=np.int64).reshape(units, -1)
        unit, copy = np.arange(units)[:, None], np.arange(self.copies)[None, :]
        return self.offset + unit * self.stride + copy * self.step

    @staticmethod
    def of(positions: Indices) -> Layout:
        """Return the most compact layout with these positions, shape (units, copies)."""
        units, copies = positions.shape
        offset = int(positions[0, 0])
        stride = int(positions[1, 0]) - offset if units > 1 else 1
        step = int(positions[0, 1]) - offset if copies > 1 else 1
        regular = Layout(offset, stride, copies, step)
        if np.array_equal(regular.positions(units), positions):
            return regular
        return Layout(table=tuple(tuple(int(p) for p in row) for row in positions))

    def __str__(self) -> str:
        if self.table is not None:
            return f"irregular, {len(self.table)} units of {len(self.table[0])} positions"
        parts = [f"from position {self.offset}"] if self.offset else []
        if self.copies > 1:
            apart = f" {self.step} apart" if self.step != 1 else ""
            parts.append(f"{self.copies} positions a unit{apart}")
        if self.stride != self.copies * self.step and self.stride != 1:
            parts.append(f"units {self.stride} apart")
        return ", ".join(parts)


@final
@dataclass(frozen=True)
class Space:
    """A set of units that are renumbered together.

    A nested space has a ``parent``: unit ``u`` lies in the parent's unit ``u // block``. Its blocks move with
    the parent's units, and inside a block its units are free (grouped convolutions, group norm, heads).
    """

    name: str
    size: int
    parent: str | None = None
    block: int = 0

    @property
    def log10_renumberings(self) -> float:
        """The base-10 logarithm of how many renumberings this space adds to its parent's."""
        if self.parent is None:
            return math.lgamma(self.size + 1) / math.log(10)
        return self.size // self.block * math.lgamma(self.block + 1) / math.log(10)


@final
@dataclass(frozen=True)
class Place:
    """One axis of one parameter or buffer that lies in a space, with its layout.

    ``axes`` has one entry, except where the meaning of an axis depends on another one, as the inputs of a
    grouped convolution depend on the group: then the tensor is seen as ``view`` and the positions count over
    the joint ``axes`` of that view.

    ``role`` says what the tensor does with these units: it ``"writes"`` them (also: shifts, scales or normalises them),
    ``"reads"`` them, summing over them as a layer does over its inputs, or ``"both"`` where it is tied.
    """

    tensor: str
    space: str
    axes: tuple[int, ...]
    layout: Layout = field(default_factory=Layout)
    view: tuple[int, ...] | None = None
    role: Role = "writes"

    def extent(self, shape: tuple[int, ...]) -> int:
        """Return how many positions the place's axes have in a tensor of this shape."""
        seen = shape if self.view is None else self.view
        return math.prod(seen[a] for a in self.axes)


@final
@dataclass(frozen=True)
class Frozen:
    """``count`` positions along ``axis`` of ``tensor`` that must keep their number, and why."""

    tensor: str
    axis: int
    count: int
    reason: str


@final
@dataclass(frozen=True)
class Structure:
    """All spaces and places of a model.

    Args:
        spaces: parents come before their children.
        places: where the spaces lie, in the order of the state dict.
        frozen: the positions that cannot be renumbered, with reasons.
        shapes: shape of every tensor of the state dict.
        aliases: state dict keys that share their tensor with another key (tied parameters).
        unknown: operations without a rule that froze what reached them, with how often they occurred.
        outputs: key paths of the outputs that count; none of them if nothing was left out.
        buffers: the tensors with a place that are buffers, such as BatchNorm's running statistics, not parameters.
    """

    spaces: tuple[Space, ...]
    places: tuple[Place, ...]
    frozen: tuple[Frozen, ...]
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    unknown: Mapping[str, int] = field(default_factory=dict[str, int])
    outputs: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_spaces(self.spaces)
        for place in self.places:
            self._check_place(place)
        self._check_overlaps()
        strange = [name for name in self.buffers if name not in self.shapes]
        if strange:
            raise StructureError(f"{strange[0]!r} is named as a buffer, but the structure does not list such a tensor")

    # -- look-ups ---------------------------------------------------------------------------------

    @cached_property
    def _spaces_by_name(self) -> dict[str, Space]:
        return {space.name: space for space in self.spaces}

    @cached_property
    def _places_by_space(self) -> dict[str, tuple[Place, ...]]:
        return _grouped(self.places, "space")

    @cached_property
    def _places_by_tensor(self) -> dict[str, tuple[Place, ...]]:
        return _grouped(self.places, "tensor")

    @cached_property
    def _positions(self) -> dict[Place, Indices]:
        return {p: p.layout.positions(self.space(p.space).size) for p in self.places}

    def space(self, name: str) -> Space:
        """Return the space of that name, or raise StructureError naming the known ones."""
        try:
            return self._spaces_by_name[name]
        except KeyError:
            known = ", ".join(list(self._spaces_by_name)[:8])
            raise StructureError(f"no space {name!r} in this structure; it has {known}") from None

    def places_of(self, space: str) -> tuple[Place, ...]:
        """Return where the units of a space lie."""
        return self._places_by_space.get(space, ())

    def places_in(self, tensor: str) -> tuple[Place, ...]:
        """Return the places in one tensor (an alias counts as the tensor that it shares)."""
        return self._places_by_tensor.get(self.aliases.get(tensor, tensor), ())

    def positions(self, place: Place) -> Indices:
        """Return the positions of every unit along the place's axes, shape (units, copies)."""
        return self._positions[place]

    def children(self, space: str) -> tuple[Space, ...]:
        """Return the spaces whose blocks are this space's units."""
        return tuple(s for s in self.spaces if s.parent == space)

    def tree(self, root: str) -> tuple[Space, ...]:
        """Return a root space and everything nested in it, parents first."""
        found = [self.space(root)]
        for space in found:
            found.extend(self.children(space.name))
        return tuple(found)

    @property
    def roots(self) -> tuple[Space, ...]:
        """The spaces without a parent: each is aligned together with what is nested in it."""
        return tuple(s for s in self.spaces if s.parent is None)

    # -- figures ----------------------------------------------------------------------------------

    @property
    def log10_renumberings(self) -> float:
        """The base-10 logarithm of the number of renumberings that keep the function."""
        return sum(space.log10_renumberings for space in self.spaces)

    @property
    def free_share(self) -> float:
        """The share of the hidden positions that can be renumbered, see :meth:`completeness`."""
        return self.completeness()["free"]

    def completeness(self) -> dict[str, float]:
        """Return the share of the hidden positions that is free (key ``"free"``), and by reason that of the rest.

        A position is one index of one axis of one tensor. Those of inputs, outputs and kernels do not count: that they
        keep their number belongs to the task. A hidden unit counts wherever it lies, also if it is fixed since it is
        added to an input or returned beside the answer. The shares sum to 1; with no hidden position all is free.
        """
        counts = Counter[str]({"free": sum(self.positions(place).size for place in self.places)})
        for item in self.frozen:
            if item.reason not in BOUNDARY_REASONS:
                counts[item.reason] += item.count
        whole = sum(counts.values())
        return {reason: count / whole for reason, count in counts.most_common()} if whole else {"free": 1.0}

    # -- JSON -------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Return the structure as JSON; :meth:`from_json` gives back an equal one."""
        places = [_without_defaults(asdict(p), Place("", "", ())) for p in self.places]
        for entry in places:
            entry["layout"] = _without_defaults(entry.get("layout", {}), Layout())
        document = {
            "format": "weldnet-structure",
            "version": 1,
            "spaces": [_without_defaults(asdict(s), Space("", 0)) for s in self.spaces],
            "places": places,
            "frozen": [asdict(f) for f in self.frozen],
            "shapes": {k: list(v) for k, v in self.shapes.items()},
            "aliases": dict(self.aliases),
            "unknown": dict(self.unknown),
            "outputs": list(self.outputs),
            "buffers": list(self.buffers),
        }
        return json.dumps(document, indent=1)

    @staticmethod
    def from_json(text: str) -> Structure:
        """Rebuild a structure from :meth:`to_json`; raise StructureError if the text is not one."""
        try:
            raw = json.loads(text)
            if raw.get("format") != "weldnet-structure" or raw.get("version") != 1:
                raise StructureError("not a weldnet structure of version 1; write it again with to_json()")
            return Structure(
                spaces=tuple(Space(**s) for s in raw["spaces"]),
                places=tuple(_place(p) for p in raw["places"]),
                frozen=tuple(Frozen(**f) for f in raw["frozen"]),
                shapes={k: tuple(v) for k, v in raw["shapes"].items()},
                aliases=raw["aliases"],
                unknown=raw["unknown"],
                outputs=tuple(raw.get("outputs", ())),
                buffers=tuple(raw.get("buffers", ())),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StructureError(f"not a weldnet structure: {error!r}; write it again with to_json()") from error

    # -- for people -------------------------------------------------------------------------------

    def __str__(self) -> str:
        from weldnet.structure._tree import plain, tree  # it draws what is defined here

        return plain(tree(self))

    # -- self-check -------------------------------------------------------------------------------

    def _check_place(self, place: Place) -> None:
        shape = self.shapes.get(place.tensor)
        if shape is None:
            raise StructureError(f"a place names the tensor {place.tensor!r}, which the structure does not list")
        if place.view is not None and math.prod(place.view) != math.prod(shape):
            raise StructureError(f"{place.tensor!r} of shape {shape} cannot be seen as {place.view}")
        rank = len(shape if place.view is None else place.view)
        if not place.axes or not all(0 <= a < rank for a in place.axes):
            raise StructureError(f"{place.tensor!r} has {rank} axes; a place names axes {place.axes}")
        positions, extent = self.positions(place), place.extent(shape)
        if positions.min() < 0 or positions.max() >= extent or len(np.unique(positions)) != positions.size:
            raise StructureError(
                f"space {place.space!r} at {place.tensor!r}: positions {positions.min()}..{positions.max()} "
                f"do not fit once each into {extent}"
            )

    def _check_overlaps(self) -> None:
        seen: dict[tuple[str, tuple[int, ...], tuple[int, ...] | None], Indices] = {}
        for place in self.places:
            key = (place.tensor, place.axes, place.view)
            both = np.concatenate([seen.get(key, np.empty(0, np.int64)), self.positions(place).ravel()])
            if len(np.unique(both)) != both.size:
                raise StructureError(f"two places claim the same positions of {place.tensor!r} axis {place.axes}")
            seen[key] = both


def _check_spaces(spaces: Iterable[Space]) -> None:
    seen: dict[str, Space] = {}
    for space in spaces:
        if space.name in seen or space.size < 1:
            raise StructureError(f"space {space.name!r} of size {space.size} is empty or listed twice")
        if space.parent is not None:
            parent = seen.get(space.parent)
            if parent is None or space.block < 1 or parent.size * space.block != space.size:
                raise StructureError(
                    f"space {space.name!r}: {space.size} units in blocks of {space.block} do not fit its parent "
                    f"{space.parent!r}" + (f" of {parent.size} units" if parent else ", which is not listed before it")
                )
        seen[space.name] = space


def _grouped(places: Iterable[Place], key: str) -> dict[str, tuple[Place, ...]]:
    groups: dict[str, list[Place]] = {}
    for place in places:
        groups.setdefault(getattr(place, key), []).append(place)
    return {name: tuple(group) for name, group in groups.items()}


def _without_defaults(entry: dict[str, Any], default: Any) -> dict[str, Any]:
    base = asdict(default)
    required = ("tensor", "space", "axes", "name", "size")
    return {k: v for k, v in entry.items() if k in required or v != base[k]}


def _place(raw: dict[str, Any]) -> Place:
    layout = dict(raw["layout"])
    if layout.get("table") is not None:
        layout["table"] = tuple(tuple(row) for row in layout["table"])
    view = tuple(raw["view"]) if raw.get("view") is not None else None
    return Place(raw["tensor"], raw["space"], tuple(raw["axes"]), Layout(**layout), view, raw.get("role", "writes"))
