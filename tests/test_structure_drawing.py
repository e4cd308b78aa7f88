"""Drawings of a structure show all of it, in the order of the forward pass, and nothing lies over anything else."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

from networks import NETWORKS, Network
from weldnet import models
from weldnet.structure import Structure, capture, draw_dot, draw_svg, layer_order, tree
from weldnet.structure._svg import LANE
from weldnet.structure._tree import plain

SVG = "{http://www.w3.org/2000/svg}"
some_networks = pytest.mark.parametrize("network", list(NETWORKS.values())[::3], ids=str)


class Backwards(nn.Module):
    """Registers its layers in the opposite order of their use."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.middle, self.first = nn.Linear(6, 2), nn.Linear(5, 6), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x).relu()).relu())


def structure_of(network: Network) -> Structure:
    return capture(network.model(0), network.example())


def resnet() -> Structure:
    return capture(models.build("resnet20"), torch.zeros(1, 3, 32, 32))


# -- the tree ----------------------------------------------------------------------------------------


@some_networks
def test_the_full_tree_shows_every_space_once_and_every_place(network: Network):
    structure = structure_of(network)
    text = plain(tree(structure, full=True))
    for space in structure.spaces:
        assert len(re.findall(rf"space {re.escape(repr(space.name))}:", text)) == 1
    for reason in {item.reason for item in structure.frozen}:
        assert f"── {reason}: " in text
    assert "more place" not in text
    assert _places_shown(text) == len(structure.places)


@some_networks
def test_the_short_tree_counts_what_it_leaves_out(network: Network):
    structure = structure_of(network)
    text = str(structure)
    alike = sum(int(number) - 1 for number in re.findall(r"\((\d+) alike", text))
    roots = [line for line in text.splitlines() if re.match(r"[├└]── space ", line)]
    assert len(roots) + alike == len(structure.roots)
    assert all(operation in text for operation in structure.unknown)
    assert all(alias in text for alias in list(structure.aliases)[:4])


def test_alike_spaces_and_long_lists_are_folded_and_add_up():
    structure = resnet()
    text = str(structure)
    assert "space 'layer1.{0..2}.conv1': 16 units (3 alike; this is layer1.0.conv1)" in text
    first = text[: text.index("layer1.{0..2}")]
    left_out = int(re.findall(r"and (\d+) more places", first)[0])
    assert _places_shown(first) + left_out == len(structure.places_of("conv1"))
    assert len(text.splitlines()) < 60 < len(plain(tree(structure, full=True)).splitlines())


def test_many_different_spaces_are_cut_with_their_number():
    sizes = range(2, 52)
    net = nn.Sequential(*(layer for a in sizes for layer in (nn.Linear(a, a + 1), nn.ReLU())), nn.Linear(52, 3))
    structure = capture(net, torch.zeros(1, 2))
    assert "and 10 more spaces" in str(structure)
    assert "more spaces" not in plain(tree(structure, full=True))


def test_nested_spaces_stand_under_their_parent():
    structure = next(s for s in map(structure_of, NETWORKS.values()) if len(s.roots) < len(s.spaces))
    lines = plain(tree(structure, full=True)).splitlines()
    for space in structure.spaces:
        if space.parent is not None:
            own, above = (
                next(i for i, line in enumerate(lines) if f"space {name!r}:" in line)
                for name in (space.name, space.parent)
            )
            assert above < own
            assert lines[own].index("space") == lines[above].index("space") + 4
            assert f"{space.block} units in each of {space.size // space.block} blocks" in lines[own]


def _places_shown(text: str) -> int:
    shown = 0
    for line in text.splitlines():
        if re.search(r"  ax[ei]s [\d, ]+.*\[[\dx]+\]$", line):
            names = re.search(r"\{(.*)\}", line)
            shown += len(names[1].split(", ")) if names else 1
    return shown


# -- the order of the layers -------------------------------------------------------------------------


def test_layers_come_in_the_order_of_the_forward_pass():
    net = Backwards()
    order = layer_order(net, torch.zeros(1, 4))
    assert order == ["", "first", "middle", "last"]
    assert not any(module._forward_pre_hooks for module in net.modules())
    structure = capture(net, torch.zeros(1, 4))
    drawing = draw_dot(structure, order)
    assert '"layer first" -> "layer middle"' in drawing
    assert '"layer middle" -> "layer last"' in drawing


def test_without_an_order_layers_come_as_in_the_state_dict():
    structure = capture(Backwards(), torch.zeros(1, 4))
    assert '"layer last" -> "layer middle"' in draw_dot(structure)


# -- SVG ---------------------------------------------------------------------------------------------


@some_networks
def test_the_picture_shows_every_space_and_place(network: Network):
    structure = structure_of(network)
    root = ElementTree.fromstring(draw_svg(structure))
    texts = [element.text or "" for element in root.iter(f"{SVG}text")]
    hints = [element.text or "" for element in root.iter(f"{SVG}title")]
    placed = {place.space for place in structure.places}
    for space in structure.spaces:
        if space.name in placed:
            assert any(text.startswith(f"{space.name}: ") for text in texts), space.name
            assert any(hint.startswith(f"{space.name}: ") for hint in hints), space.name
    pairs = {
        (place.space, tensor.rpartition(".")[0])
        for tensor in _all_tensors(structure)
        for place in structure.places_in(tensor)
    }
    assert len(_dots(root)) == len(pairs)


@some_networks
def test_nothing_in_the_picture_lies_over_anything_else_or_outside(network: Network):
    structure = structure_of(network)
    root = ElementTree.fromstring(draw_svg(structure))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    dots = _dots(root)
    assert len(set(dots)) == len(dots)
    for line in (element for element in root.iter() if element.tag in (f"{SVG}text", f"{SVG}rect")):
        x, y = float(line.get("x", 0)), float(line.get("y", 0))
        text = (line.text or "") + "".join(child.tail or "" for child in line)
        wide = float(line.get("width", 0)) if line.tag == f"{SVG}rect" else 6.4 * len(text.strip())
        assert 0 <= x <= x + wide <= width
        assert 0 <= y <= height
    lanes = [(x, *ends) for x, ends in _lanes(root)]
    for x, first, last in lanes:
        over = [(a, b, c) for a, b, c in lanes if a == x and b <= last and first <= c]
        assert over == [(x, first, last)]


def test_lanes_are_used_again_when_they_are_free():
    root = ElementTree.fromstring(draw_svg(resnet()))
    assert len({x for x, _ in _lanes(root)}) == 3
    xs = sorted({x for x, _ in _lanes(root)})
    assert all(b - a == LANE for a, b in itertools.pairwise(xs))


def test_names_are_escaped():
    net = nn.Sequential()
    net.add_module('a<b> & "c" \\', nn.Linear(4, 8))
    net.add_module("d\x01\u202e", nn.Linear(8, 2))
    structure = capture(net, torch.zeros(1, 4))
    root = ElementTree.fromstring(draw_svg(structure, title="<&>"))
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert 'a<b> & "c" \\' in texts
    assert "<&>" in texts
    assert '"layer a<b> & \\"c\\" \\\\"' in draw_dot(structure)
    for name in ("\x01", "\u202e"):
        assert name not in draw_dot(structure) + draw_svg(structure)


def test_a_structure_without_spaces_is_drawn_too():
    structure = replace(capture(nn.Linear(3, 2), torch.zeros(1, 3)), frozen=())
    assert not structure.spaces
    ElementTree.fromstring(draw_svg(structure))
    assert "layer " in draw_dot(structure)
    assert "0 spaces" in str(structure)


def _all_tensors(structure: Structure) -> list[str]:
    return [*structure.shapes, *structure.aliases]


def _dots(root: ElementTree.Element) -> list[tuple[str, str]]:
    return [(e.get("x", ""), e.get("y", "")) for e in root.iter(f"{SVG}text") if e.get("class") == "axis"]


def _lanes(root: ElementTree.Element) -> list[tuple[float, tuple[float, float]]]:
    found = [re.fullmatch(r"M(\d+) (\d+)V(\d+)", e.get("d", "")) for e in root.iter(f"{SVG}path")]
    return [(float(m[1]), (float(m[2]), float(m[3]))) for m in found if m]


# -- DOT ---------------------------------------------------------------------------------------------


@some_networks
def test_graphviz_gets_every_space_layer_and_place(network: Network):
    structure = structure_of(network)
    drawing = draw_dot(structure)
    statements = [line.strip() for line in drawing.splitlines()]
    assert statements.count("}") + (statements[-1] == "}") - 1 == sum(line.endswith("{") for line in statements)
    for space in structure.spaces:
        assert sum(line.startswith(f'"space {space.name}" [') for line in statements) == 1
    for tensor in _all_tensors(structure):
        module = tensor.rpartition(".")[0]
        assert sum(line.startswith(f'"layer {module}" [') for line in statements) == 1
        for place in structure.places_in(tensor):
            edge = [line for line in statements if line.startswith(f'"space {place.space}" -> "layer {module}" [')]
            assert len(edge) == 1
            assert f"ax{'i' if len(place.axes) == 1 else 'e'}s {place.axes[0]}" in edge[0]
