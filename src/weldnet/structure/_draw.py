"""The structure as a picture: what is on it, and Graphviz DOT."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from weldnet._modules import bare
from weldnet.structure._copies import own_copy
from weldnet.structure._spec import Place, Space, Structure
from weldnet.structure._trace import call
from weldnet.structure._tree import axis_words, shape_words, size_words

__all__ = ["COLOURS", "Mark", "Row", "clean", "draw_dot", "lay_out", "layer_order", "space_colours"]

#: Of spaces, in turn; each stands out from a white and from a black background, and white stands out from each.
COLOURS = (
    *("#2f78c8", "#c25a14", "#2a8551", "#c93f3f", "#8257c2"),
    *("#96653c", "#c4458a", "#14808f", "#74791b", "#5f7490"),
)

# What XML 1.0 cannot hold, and what would turn the direction of writing.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


@final
@dataclass(frozen=True)
class Mark:
    """A space that lies in a module: the axes in short, and the tensors with their axes in words."""

    space: str
    axes: str
    words: tuple[str, ...]


@final
@dataclass(frozen=True)
class Row:
    """A module with its tensors, the spaces that lie in them, why the rest is frozen, and what is tied to others."""

    module: str
    tensors: tuple[str, ...]
    marks: tuple[Mark, ...]
    frozen: tuple[str, ...]
    tied: tuple[str, ...]


def layer_order(model: nn.Module, example_input: Any) -> list[str]:
    """Return the names of a model's modules in the order in which a forward pass first enters them.

    Args:
        model: not changed; a copy runs.
        example_input: as for :func:`weldnet.capture`.

    Raises:
        ModelError: the model fails on this input.
    """
    order: dict[str, None] = {}
    model = own_copy(bare(model))
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_pre_hook(lambda *_, name=name: order.setdefault(name))
    call(model, None, example_input)
    return list(order)


def lay_out(structure: Structure, order: Sequence[str] = ()) -> list[Row]:
    """Gather what a picture shows, one row for each module that has tensors.

    Args:
        structure: what to show.
        order: modules in the order of the forward pass, from :func:`layer_order`; the rest stay where they are in the
            state dict, behind the module before them.
    """
    modules: dict[str, list[str]] = {}
    for tensor in (*structure.shapes, *structure.aliases):
        modules.setdefault(tensor.rpartition(".")[0], []).append(tensor)
    rank = {name: position for position, name in enumerate(order)}
    keys: dict[str, int] = {}
    last = -1
    for module in modules:
        last = keys[module] = rank.get(module, last)
    return [_row(structure, module, modules[module]) for module in sorted(modules, key=keys.__getitem__)]


def draw_dot(structure: Structure, order: Sequence[str] = (), *, title: str = "structure") -> str:
    """Draw the spaces over the layers in the language of Graphviz.

    Boxes are modules in the order of the forward pass, ellipses are spaces, an edge is a space's places in a module
    with the tensors and axes; nested spaces lie in the cluster of their parent.

    Args:
        structure: what to draw.
        order: modules in the order of the forward pass, from :func:`layer_order`.
        title: of the drawing.
    """
    rows = lay_out(structure, order)
    lines = [
        f"digraph {_quoted(title)} {{",
        f'  graph [rankdir="LR", label={_quoted(title)}, labelloc="t", fontname="sans-serif"];',
        '  node [fontname="sans-serif", fontsize=11]; edge [fontname="sans-serif", fontsize=9];',
        "  subgraph layers {",
        '    rank="same"; node [shape="box", style="rounded"];',
        *(f"    {_layer(row.module)} [label={_quoted(_box(row))}];" for row in rows),
        *(
            f'    {_layer(a.module)} -> {_layer(b.module)} [style="dotted", arrowhead="none", weight=100];'
            for a, b in itertools.pairwise(rows)
        ),
        "  }",
    ]
    colours = space_colours(structure)
    for root in structure.roots:
        lines += _cluster(structure, root, colours, "  ")
    for row in rows:
        for mark in row.marks:
            words = _quoted("\n".join(mark.words))
            lines.append(
                f"  {_space(mark.space)} -> {_layer(row.module)} "
                f'[label={words}, color="{colours[mark.space]}", fontcolor="{colours[mark.space]}"];'
            )
    return "\n".join([*lines, "}"]) + "\n"


def space_colours(structure: Structure) -> dict[str, str]:
    """Give every space a colour; neighbours differ."""
    ordered = [space for root in structure.roots for space in structure.tree(root.name)]
    return {space.name: COLOURS[number % len(COLOURS)] for number, space in enumerate(ordered)}


def clean(text: str) -> str:
    """Make a name fit for a drawing: no control characters.

    >>> clean("a\\x00b")
    'a?b'
    """
    return _CONTROL.sub("?", text)


# -- one row -----------------------------------------------------------------------------------------


def _row(structure: Structure, module: str, tensors: Sequence[str]) -> Row:
    shapes: dict[tuple[int, ...], list[str]] = {}
    for tensor in tensors:
        shapes.setdefault(structure.shapes[structure.aliases.get(tensor, tensor)], []).append(_leaf(tensor))
    found: dict[str, list[tuple[str, Place]]] = {}
    for tensor in tensors:
        for place in structure.places_in(tensor):
            found.setdefault(place.space, []).append((_leaf(tensor), place))
    reasons = {f.reason: None for f in structure.frozen if f.tensor in tensors}
    tied = [f"{_leaf(t)} is {structure.aliases[t]}" for t in tensors if t in structure.aliases]
    return Row(
        module,
        tuple(f"{', '.join(leaves)} {shape_words(shape)}" for shape, leaves in shapes.items() if shape),
        tuple(_mark(space, places) for space, places in found.items()),
        tuple(reasons),
        tuple(tied),
    )


def _mark(space: str, places: Sequence[tuple[str, Place]]) -> Mark:
    groups: dict[str, list[str]] = {}
    for leaf, place in places:
        groups.setdefault(axis_words(place), []).append(leaf)
    axes = dict.fromkeys("+".join(map(str, place.axes)) for _, place in places)
    return Mark(space, ",".join(axes), tuple(f"{', '.join(leaves)}: {words}" for words, leaves in groups.items()))


def _leaf(tensor: str) -> str:
    return tensor.rpartition(".")[2]


# -- DOT ---------------------------------------------------------------------------------------------


def _cluster(structure: Structure, space: Space, colours: dict[str, str], indent: str) -> Iterator[str]:
    children = structure.children(space.name)
    label = f"{space.name}\n{size_words(space, bool(children))}"
    node = f'{_space(space.name)} [label={_quoted(label)}, color="{colours[space.name]}", penwidth=2];'
    if not children:
        yield indent + node
        return
    yield f"{indent}subgraph {_quoted(f'cluster {space.name}')} {{"
    yield f'{indent}  label=""; style="rounded"; color="{colours[space.name]}";'
    yield f"{indent}  {node}"
    for child in children:
        yield from _cluster(structure, child, colours, indent + "  ")
    yield f"{indent}}}"


def _box(row: Row) -> str:
    return "\n".join([row.module or "(the model itself)", *row.tensors])


def _layer(module: str) -> str:
    return _quoted(f"layer {module}")


def _space(name: str) -> str:
    return _quoted(f"space {name}")


def _quoted(text: str) -> str:
    r"""Quote a text for DOT; ``\n`` is the one escape that it needs.

    >>> print(_quoted('a "b" \\ c\nd'))
    "a \"b\" \\ c\nd"
    """
    lines = [clean(line).replace("\\", "\\\\").replace('"', '\\"') for line in text.split("\n")]
    return '"' + "\\n".join(lines) + '"'
