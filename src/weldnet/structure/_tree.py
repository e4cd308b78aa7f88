"""The structure as a tree to read: spaces, what is nested in them, where they lie, what is frozen and why."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from weldnet._words import counted
from weldnet.structure._spec import BOUNDARY_REASONS, Frozen, Place, Space, Structure

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

__all__ = ["axis_words", "headline", "plain", "shape_words", "size_words", "tensor_names", "tree"]

SPACES, PLACES, WHERE = 40, 5, 4

_NUMBER = re.compile(r"\d+")
_NAME, _DIM, _BAD = "bold", "dim", "yellow"


def tree(structure: Structure, *, full: bool = False) -> Tree:
    """Lay a structure out for reading.

    Args:
        structure: what to show.
        full: show every space and every place; otherwise spaces that differ only in a number of their names are shown
            once, and long lists are cut, with counts.

    Returns:
        A rich tree: print it on a console, or make it text with :func:`plain`.
    """
    from rich.tree import Tree

    root = Tree(_text((headline(structure), _NAME)), guide_style=_DIM)
    if structure.outputs:
        root.add(_text(("outputs that count: ", _NAME), (", ".join(structure.outputs), "")))
    groups = [[space] for space in structure.roots] if full else _alike(structure)
    shown = groups if full else groups[:SPACES]
    for group in shown:
        _add_space(root, structure, group, full)
    if len(shown) < len(groups):
        root.add(_text((f"and {sum(map(len, groups[SPACES:]))} more spaces with what is nested in them", _DIM)))
    _add_frozen(root, structure, full)
    _add_notes(root, structure, full)
    return root


def plain(drawing: Tree) -> str:
    """Return a tree as text without colours, however wide."""
    from rich.console import Console

    written = io.StringIO()
    Console(file=written, width=100_000, color_system=None).print(drawing, soft_wrap=True, highlight=False)
    return written.getvalue().rstrip("\n")


def tensor_names(names: Iterable[str]) -> list[str]:
    """Join the names of tensors that differ behind their last dot.

    >>> tensor_names(["bn.weight", "bn.bias", "fc.weight"])
    ['bn.{weight, bias}', 'fc.weight']
    """
    modules: dict[str, list[str]] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, []).append(leaf)
    joined: list[str] = []
    for module, leaves in modules.items():
        inside = leaves[0] if len(leaves) == 1 else f"{{{', '.join(leaves)}}}"
        joined.append(f"{module}.{inside}" if module else inside)
    return joined


def headline(structure: Structure) -> str:
    """Say in one line how many spaces there are and how much of the model they cover."""
    tensors = len({place.tensor for place in structure.places})
    return (
        f"{counted(len(structure.spaces), 'space')}, {counted(len(structure.places), 'place')} in {tensors} of "
        f"{counted(len(structure.shapes), 'tensor')}, {structure.free_share:.1%} of the hidden positions free, "
        f"10^{structure.log10_renumberings:.1f} renumberings"
    )


def axis_words(place: Place) -> str:
    """Say which axis a place is, and how the units lie on it."""
    axes = f"axis {place.axes[0]}" if len(place.axes) == 1 else f"axes {', '.join(map(str, place.axes))}"
    seen = f" of {shape_words(place.view)}" if place.view is not None else ""
    return ", ".join(filter(None, (axes + seen, str(place.layout))))


# -- the parts of the tree ---------------------------------------------------------------------------


def _add_space(parent: Tree, structure: Structure, group: Sequence[Space], full: bool) -> None:
    """Add the first of some spaces that are alike, and everything nested in it."""
    space = group[0]
    children = structure.children(space.name)
    alike = f" ({len(group)} alike; this is {space.name})" if len(group) > 1 else ""
    name = repr(_common_name([each.name for each in group]))
    size = f": {size_words(space, bool(children))}"
    branch = parent.add(_text(("space ", ""), (name, _NAME), (size, ""), (alike, _DIM)))
    lines = _place_lines(structure, space.name)
    shown = lines if full or len(lines) <= PLACES + 1 else lines[:PLACES]
    width = max((len(names) for names, _, _ in shown), default=0)
    for names, words, _ in shown:
        branch.add(_text((names.ljust(width), ""), (f"  {words}", _DIM)))
    if len(shown) < len(lines):
        rest = sum(count for _, _, count in lines[PLACES:])
        branch.add(_text((f"and {counted(rest, 'more place')}", _DIM)))
    for child in children:
        _add_space(branch, structure, [child], full)


def size_words(space: Space, has_children: bool) -> str:
    if space.parent is not None:
        blocks = f"{counted(space.block, 'unit')} in each of {counted(space.size // space.block, 'block')}"
        return f"{blocks}, themselves blocks" if has_children else blocks
    return counted(space.size, "block" if has_children else "unit")


def _place_lines(structure: Structure, space: str) -> list[tuple[str, str, int]]:
    """Return what to write for the places of a space: names, axis and shape, how many places that is."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for place in structure.places_of(space):
        module = place.tensor.rpartition(".")[0]
        key = (module, structure.shapes[place.tensor], place.axes, place.view, place.layout)
        groups.setdefault(key, []).append(place.tensor)
    lines: list[tuple[str, str, int]] = []
    for (_, shape, axes, view, layout), tensors in groups.items():
        words = axis_words(Place(tensors[0], space, axes, layout, view))
        lines.append((tensor_names(tensors)[0], f"{words}  [{shape_words(shape)}]", len(tensors)))
    return lines


def _add_frozen(root: Tree, structure: Structure, full: bool) -> None:
    if not structure.frozen:
        return
    counts = Counter[str]()
    for item in structure.frozen:
        counts[item.reason] += item.count
    branch = root.add(_text(("frozen", _NAME)))
    hidden = _hidden(structure)
    for reason, count in counts.most_common():
        inner = reason not in BOUNDARY_REASONS
        share = f", {count / hidden:.1%} of the hidden ones" if inner and hidden else ", which the task fixes"
        where = _where([item for item in structure.frozen if item.reason == reason], full)
        branch.add(
            _text((reason, _BAD if inner else ""), (f": {counted(count, 'position')}{share}", ""), (f"; {where}", _DIM))
        )


def _where(frozen: Sequence[Frozen], full: bool) -> str:
    axes: dict[tuple[str, int], list[str]] = {}
    for item in frozen:
        axes.setdefault((item.tensor.rpartition(".")[0], item.axis), []).append(item.tensor)
    words = [f"{tensor_names(tensors)[0]} axis {axis}" for (_, axis), tensors in axes.items()]
    shown = words if full else words[:WHERE]
    more = f" and {len(words) - len(shown)} more" if len(shown) < len(words) else ""
    return f"at {', '.join(shown)}{more}"


def _add_notes(root: Tree, structure: Structure, full: bool) -> None:
    for operation, count in structure.unknown.items():
        root.add(_text((f"no rule for {operation} ({count}x): what reaches it is frozen", _BAD)))
    tied = [f"{alias} is {tensor}" for alias, tensor in structure.aliases.items()]
    if tied:
        shown = tied if full else tied[:WHERE]
        more = f" and {len(tied) - len(shown)} more" if len(shown) < len(tied) else ""
        root.add(_text(("tied: ", _NAME), (", ".join(shown) + more, "")))


def _hidden(structure: Structure) -> int:
    free = sum(structure.positions(place).size for place in structure.places)
    return free + sum(item.count for item in structure.frozen if item.reason not in BOUNDARY_REASONS)


# -- spaces that are alike ---------------------------------------------------------------------------


def _alike(structure: Structure) -> list[list[Space]]:
    """Group the roots that differ in the numbers of their names only, in order."""
    groups: dict[Any, list[Space]] = {}
    for space in structure.roots:
        groups.setdefault(_signature(structure, space), []).append(space)
    return list(groups.values())


def _signature(structure: Structure, space: Space) -> tuple[Any, ...]:
    places = tuple(
        (_pattern(place.tensor), structure.shapes[place.tensor], place.axes, place.layout, place.view)
        for place in structure.places_of(space.name)
    )
    nested = tuple(_signature(structure, child) for child in structure.children(space.name))
    return (_pattern(space.name), space.size, space.block, places, nested)


def _pattern(name: str) -> str:
    return _NUMBER.sub("0", name)


def _common_name(names: Sequence[str]) -> str:
    """Write the names of alike spaces as one.

    >>> _common_name(["h.0.mlp", "h.1.mlp", "h.2.mlp"]), _common_name(["h.0.fc", "h.3.fc"])
    ('h.{0..2}.mlp', 'h.{0,3}.fc')
    >>> _common_name(["layer1.1.conv", "layer1.2.conv", "layer2.0.conv"])
    'layer{1,2}.{0..2}.conv'
    """
    columns = list(zip(*([int(number) for number in _NUMBER.findall(name)] for name in names), strict=True))
    rewritten = iter([_numbers(sorted(set(column))) for column in columns])
    return _NUMBER.sub(lambda _: next(rewritten), names[0])


def _numbers(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    together = numbers[-1] - numbers[0] + 1 == len(numbers)
    return f"{{{numbers[0]}..{numbers[-1]}}}" if together and len(numbers) > 2 else f"{{{','.join(map(str, numbers))}}}"


# -- words -------------------------------------------------------------------------------------------


def shape_words(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _text(*parts: tuple[str, str]) -> Text:
    from rich.text import Text

    return Text.assemble(*(part for part in parts if part[0]))
