"""Networks of other widths: what transport must keep, and what fuse() makes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import weldnet
from test_laws import ATTENTION, GROUPED, MLP, NETWORKS, Network, difference
from weldnet.alignment import Gamf, OptimalTransport, Problem, WeightMatching, transport, truncation
from weldnet.assignment import Plan
from weldnet.errors import AlignmentError, CheckpointError, UsageError, WidthError
from weldnet.structure import Structure, capture, require_correspondence

#: Without blocks, and without tensors that are read and written.
FLAT = [n for n in NETWORKS if n.name in ("mlp", "residual", "split", "depthwise", "recurrent")]


def even(w: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, w, 3), nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, 2 * w, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * w, w), nn.Tanh(), nn.Linear(w, 4),
    )  # fmt: skip


EVEN = Network("even", even, 6, (4, 3, 6, 6))

#: All of whose spaces grow alike, so that every unit has as many copies, as uniform marginals need.
PROPORTIONAL = [*(n for n in FLAT if n.name in ("depthwise", "recurrent")), EVEN]
FLAT.append(EVEN)


def wider(network: Network, factor: int = 2) -> Network:
    return replace(network, width=factor * network.width)


def copies(narrow: Structure, wide: Structure) -> dict[str, Plan]:
    """Couplings that make unit u of the wide network a copy of unit ``u % n`` of the narrow one."""
    found = {}
    for space, end in zip(narrow.spaces, wide.spaces, strict=True):
        values = torch.zeros(space.size, end.size, dtype=torch.float64)
        values[torch.arange(end.size) % space.size, torch.arange(end.size)] = 1
        found[space.name] = Plan(values, values.sum(1))
    return found


def reversed_plans(couplings: dict[str, Plan]) -> dict[str, Plan]:
    return {space: Plan(c.values.T, c.columns, c.rows) for space, c in couplings.items()}


def widened(network: Network, seed: int) -> dict[str, torch.Tensor]:
    wide = wider(network)
    couplings = copies(network.structure, wide.structure)
    return transport(network.state(seed), network.structure, couplings, wide.structure)


@pytest.mark.parametrize("network", FLAT, ids=str)
def test_copied_units_compute_the_same_function(network):
    assert difference(wider(network).outputs(widened(network, 1)), network.outputs(network.state(1))) <= 1e-12


@pytest.mark.parametrize("network", FLAT, ids=str)
def test_copied_units_brought_together_again_are_the_network(network):
    wide = wider(network)
    back = reversed_plans(copies(network.structure, wide.structure))
    again = transport(widened(network, 1), wide.structure, back, network.structure)
    for name, tensor in network.state(1).items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("network", FLAT, ids=str)
def test_a_mean_of_what_is_read_would_not_do(network):
    """OTFusion's own formula divides columns on both sides: half of the input is lost where two units become one."""
    wide = wider(network)
    back = reversed_plans(copies(network.structure, wide.structure))
    writes = replace(wide.structure, places=tuple(replace(p, role="writes") for p in wide.structure.places))
    target = replace(network.structure, places=tuple(replace(p, role="writes") for p in network.structure.places))
    averaged = transport(widened(network, 1), writes, back, target)
    assert difference(network.outputs(averaged), network.outputs(network.state(1))) > 0.05


@pytest.mark.parametrize("network", PROPORTIONAL, ids=str)
def test_copies_are_found_and_fused_into_the_network_itself(network):
    wide, narrow_state = wider(network), network.state(1)
    structures = {"narrow": network.structure, "wide": wide.structure}
    for into, other in (("narrow", "wide"), ("wide", "narrow")):
        states = {"narrow": narrow_state, "wide": widened(network, 1)}
        problem = Problem(
            structures[into], {into: states[into], other: states[other]}, structures={other: structures[other]}
        )
        alignment = OptimalTransport()(problem)
        moved = transport(states[other], structures[other], alignment[other], structures[into])
        home = network if into == "narrow" else wide
        assert difference(home.outputs(moved), network.outputs(narrow_state)) <= 1e-9, into


@pytest.mark.parametrize("network", FLAT, ids=str)
def test_truncation_keeps_the_first_units(network):
    wide = wider(network)
    state = wide.state(2)
    cut = transport(state, wide.structure, truncation(wide.structure, network.structure), network.structure)
    assert {n: t.shape for n, t in cut.items()} == {n: t.shape for n, t in network.state(0).items()}
    if network.name == "mlp":
        assert torch.equal(cut["2.weight"], state["2.weight"][:12, :9])
        padded = transport(cut, network.structure, truncation(network.structure, wide.structure), wide.structure)
        assert torch.equal(padded["2.weight"][:12, :9], cut["2.weight"])
        assert not padded["2.weight"][12:].any()
        assert not padded["2.weight"][:, 9:].any()


# -- fuse() ------------------------------------------------------------------------------------------


def perceptron(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width + 2), nn.BatchNorm1d(width + 2), nn.ReLU(),
        nn.Linear(width + 2, 3),
    ).eval()  # fmt: skip


X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("into", "width"), [("a", 8), ("b", 14), (None, 8)])
def test_fuse_takes_the_widths_of_one_network(into, width):
    a, b = perceptron(8, 0), perceptron(14, 1)
    result = weldnet.fuse([a, b], X, method="optimal_transport", into=into, evaluate_on=lambda net: 0.0)
    assert result.model[0].out_features == width
    assert result.model[0].weight.shape == (width, 6)
    assert result.config["into"] == (into or "a")
    assert list(result.alignment.couplings) == ["a", "b"]
    other = "b" if width == 8 else "a"
    errors = {row.name: row.equivalence for row in result.report.rows if row.role == "parent"}
    assert errors[other] is None
    assert errors["ba"[other == "b"]] <= 1e-9
    assert any(f"the couplings of {other} are soft" in note for note in result.report.notes)
    assert any("cuts off" in note for note in result.report.notes)
    assert [row.name for row in result.report.rows] == ["a", "b", "naive truncation", "fused"]
    assert "passed" in result.report.check


@pytest.mark.parametrize("into", ["a", "b"])
def test_repairs_work_on_other_widths(into):
    a, b = perceptron(8, 0), perceptron(14, 1)
    result = weldnet.fuse(
        [a, b], X, method="optimal_transport", into=into, data=torch.randn(64, 6), evaluate_on=lambda net: 0.0
    )
    assert result.report.repair.startswith("auto: refit")
    assert bool(torch.isfinite(result.model(X)).all())


def test_the_order_of_the_networks_does_not_decide_the_widths():
    a, b = perceptron(8, 0), perceptron(14, 1)
    one = weldnet.fuse({"a": a, "b": b}, X, method="optimal_transport", into="a")
    other = weldnet.fuse({"b": b, "a": a}, X, method="optimal_transport", into="a")
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor)


def test_into_works_for_equal_widths_too():
    a, b = perceptron(8, 0), perceptron(8, 1)
    result = weldnet.fuse([a, b], X, into="b")
    assert result.alignment.moved["b"] == 0
    assert result.alignment.moved["a"] > 0


def test_auto_is_a_method_that_takes_other_widths():
    a, b = perceptron(8, 0), perceptron(14, 1)
    for data in (None, torch.randn(64, 6)):
        result = weldnet.fuse([a, b], X, method="auto", data=data, repair="none")
        assert result.report.method.startswith("optimal_transport (auto: the widths differ")
        expected = weldnet.fuse([a, b], X, method="optimal_transport", repair="none")
        torch.testing.assert_close(result.state_dict(), expected.state_dict(), rtol=0, atol=0)
    found = weldnet.compare([a, b], X, methods=["auto"], repairs=["none"])
    assert [(row.method, row.error) for row in found.rows] == [("auto: optimal_transport", None)]
    structures = {"a": weldnet.capture(a, X), "b": weldnet.capture(b, X)}
    alignment = weldnet.align([a, b], structures["a"], method="auto", structures=structures)
    assert alignment.couplings == result.alignment.couplings


def test_fusing_with_a_widened_copy_gives_back_the_function():
    network, copy = EVEN.model(1), wider(EVEN).loaded(widened(EVEN, 1))
    for networks in ([network, copy], [copy, network]):
        result = weldnet.fuse(networks, EVEN.inputs, method="optimal_transport")
        assert difference(result.model(EVEN.inputs).detach(), network(EVEN.inputs).detach()) <= 1e-9


@pytest.mark.parametrize("method", [Gamf(), WeightMatching(), "identity"], ids=str)
def test_methods_that_need_equal_widths_say_what_can(method):
    with pytest.raises(WidthError, match=r"space '0' has 8 units in 'a' and 14 in 'b'; \w+ needs .* optimal_transport"):
        weldnet.fuse([perceptron(8, 0), perceptron(14, 1)], X, method=method)


def test_other_architectures_are_not_other_widths():
    a = perceptron(8, 0)
    taller = nn.Sequential(*list(perceptron(8, 1))[:-1], nn.Linear(10, 4)).eval()
    with pytest.raises(CheckpointError, match=r"5\.weight"):
        weldnet.fuse([a, taller], X, method="optimal_transport")
    other_input = nn.Sequential(nn.Linear(7, 8), *list(perceptron(8, 1))[1:]).eval()
    with pytest.raises(CheckpointError, match=r"0\.weight"):
        weldnet.fuse([a, other_input], X, method="optimal_transport")
    with pytest.raises(UsageError, match="into is 'c', which is no network; give one of a, b"):
        weldnet.fuse([a, a], X, into="c")


@pytest.mark.parametrize("network", [GROUPED, ATTENTION], ids=str)
def test_blocks_of_other_widths_are_named(network):
    with pytest.raises(WidthError, match=r"space '.*' has \d+ units in 'a' and \d+ in 'b', in blocks"):
        require_correspondence(network.structure, wider(network).structure)


def test_tied_tensors_have_one_width():
    tied = NETWORKS[5]
    wide = wider(tied)
    problem = Problem(tied.structure, {"a": tied.state(0), "b": wide.state(1)}, structures={"b": wide.structure})
    with pytest.raises(WidthError, match=r"space 'embed': embed\.weight both writes and reads"):
        transport(wide.state(1), wide.structure, OptimalTransport()(problem)["b"], tied.structure)


def test_structures_that_do_not_correspond_are_named():
    other = capture(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), torch.zeros(1, 6))
    with pytest.raises(AlignmentError, match="the space '2' is not in both"):
        require_correspondence(MLP.structure, other, ("one", "two"))


def test_transport_wants_the_structure_that_a_plan_was_made_for():
    wide = wider(MLP)
    back = reversed_plans(copies(MLP.structure, wide.structure))
    with pytest.raises(WidthError, match="space '0' has 18 units in the network and 18 in the universe"):
        transport(wide.state(0), wide.structure, back)
    with pytest.raises(WidthError, match="and it has no coupling; give target="):
        transport(wide.state(0), wide.structure, {"0": back["0"]}, MLP.structure)


# -- folding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", FLAT, ids=str)
def test_folding_copies_gives_back_the_function(network):
    """Also where some units have two copies and others one or three."""
    wide = wider(network)
    folded = weldnet.fold(wide.loaded(widened(network, 1)), network.model(5), network.inputs)
    assert {n: t.shape for n, t in folded.state_dict().items()} == {n: t.shape for n, t in network.state(0).items()}
    with torch.no_grad():
        assert difference(folded(network.inputs), network.outputs(network.state(1))) <= 1e-9


def test_room_that_copies_leave_stays_empty():
    wide = replace(MLP, width=18)
    folded = weldnet.fold(wide.loaded(widened(MLP, 1)), replace(MLP, width=13).model(0), MLP.inputs)
    with torch.no_grad():
        assert difference(folded(MLP.inputs), MLP.outputs(MLP.state(1))) <= 1e-9


def test_folding_does_not_depend_on_the_weights_of_the_narrow_network_and_changes_nothing():
    wide = wider(MLP).model(3)
    before = {name: tensor.clone() for name, tensor in wide.state_dict().items()}
    one, other = (weldnet.fold(wide, MLP.model(seed), MLP.inputs) for seed in (0, 1))
    for name, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
        assert not torch.equal(tensor, MLP.state(0)[name])
    assert all(torch.equal(wide.state_dict()[name], tensor) for name, tensor in before.items())


def test_folding_is_better_than_cutting_off():
    torch.manual_seed(0)
    wide = wider(EVEN)
    state = widened(EVEN, 1)
    noisy = {n: t + 0.02 * t.std() * torch.randn_like(t) if t.dim() > 1 else t for n, t in state.items()}
    expected = wide.outputs(noisy)
    with torch.no_grad():
        folded = weldnet.fold(wide.loaded(noisy), EVEN.model(0), EVEN.inputs)(EVEN.inputs)
    cut = transport(noisy, wide.structure, truncation(wide.structure, EVEN.structure), EVEN.structure)
    assert difference(folded, expected) < 0.1 * difference(EVEN.outputs(cut), expected)


def test_what_cannot_be_folded_is_named():
    with pytest.raises(
        WidthError, match="space '0' has 9 units in the network and 18 in the one that it is to be folded"
    ):
        weldnet.fold(MLP.model(0), wider(MLP).model(0), MLP.inputs)
    with pytest.raises(WidthError, match="in blocks"):
        weldnet.fold(wider(GROUPED).model(0), GROUPED.model(0), GROUPED.inputs)
    with pytest.raises(CheckpointError, match="2 keys in common"):
        weldnet.fold(MLP.model(0), EVEN.model(0), MLP.inputs)
