"""Soft couplings, nested ones too: transport, files, and what GAMF does on the way to permutations."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from test_laws import ATTENTION, DEEP, GROUPED, MLP, NETWORKS, Network, random_couplings, three
from weldnet.affinity import Gaussian, InnerProduct
from weldnet.alignment import Alignment, Gamf, Problem, gamf, transport
from weldnet.alignment import _ascent as ascent_file
from weldnet.alignment._sweeps import Assignments, assign
from weldnet.assignment import Coupling, NestedPlan, Permutation, Plan, best_inside, sinkhorn, unfold
from weldnet.errors import AlignmentError, CheckpointError
from weldnet.structure import Maps, Structure, carried_rows, partners

NESTED = [n for n in NETWORKS if any(s.parent for s in n.structure.spaces)]


def plans(*shape: int, seed: int) -> Tensor:
    """Doubly stochastic matrices of the given shape (..., n, n), far from uniform."""
    scores = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return sinkhorn(scores, 0.5, iterations=5000, tolerance=1e-12)[0]


def soft_couplings(structure: Structure, *, hard_inside: bool = False) -> dict[str, Coupling]:
    found: dict[str, Coupling] = {}
    for seed, space in enumerate(structure.spaces):
        if space.parent is None:
            found[space.name] = Plan(plans(space.size, space.size, seed=seed))
        else:
            outer = found[space.parent].matrix()
            inner = plans(len(outer), len(outer), space.block, space.block, seed=seed)
            found[space.name] = NestedPlan(outer, best_inside(inner) if hard_inside else inner)
    return found


def as_plans(structure: Structure, hard: dict[str, Permutation]) -> dict[str, Coupling]:
    """The same couplings in the types of soft ones; pairs of blocks that are not coupled get some permutation."""
    found: dict[str, Coupling] = {}
    for space in structure.spaces:
        if space.parent is None:
            found[space.name] = Plan(hard[space.name].matrix())
            continue
        outer = hard[space.parent]
        source = hard[space.name].source.reshape(-1, space.block)
        inner = torch.arange(space.block).flip(0).repeat(len(outer), len(outer), 1)
        inner[outer.source, torch.arange(len(outer))] = source % space.block
        found[space.name] = NestedPlan(outer.matrix(), inner)
    return found


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_plans_that_are_permutations_carry_like_permutations(network):
    state, hard = network.state(1), random_couplings(network.structure, 3)
    expected = transport(state, network.structure, hard)
    for name, tensor in transport(state, network.structure, as_plans(network.structure, hard)).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("hard_inside", [False, True])
def test_a_grouped_convolution_has_the_weight_of_the_group_once(hard_inside):
    structure, state = GROUPED.structure, GROUPED.state(1)
    couplings = soft_couplings(structure, hard_inside=hard_inside)
    outer, (before, behind) = structure.roots[0], [s for s in structure.spaces if s.parent]
    weights = state["3.weight"].reshape(outer.size, behind.block, before.block, 3, 3)
    p = couplings[outer.name].matrix()
    q_in, q_out = (unfold(torch.ones_like(p), couplings[s.name].inner) for s in (before, behind))
    q_in = q_in.reshape(outer.size, before.block, outer.size, before.block)
    q_out = q_out.reshape(outer.size, behind.block, outer.size, behind.block)
    expected = torch.zeros_like(weights)
    for a, u in itertools.product(range(outer.size), repeat=2):
        inside = torch.einsum("oihw,oq,ip->qphw", weights[a], q_out[a, :, u], q_in[a, :, u])
        expected[u] += p[a, u] * inside
    moved = transport(state, structure, couplings)
    torch.testing.assert_close(moved["3.weight"], expected.reshape(moved["3.weight"].shape))
    torch.testing.assert_close(moved["0.bias"], couplings[before.name].matrix().T @ state["0.bias"])
    assert moved["7.bias"] is state["7.bias"]


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_uniform_plans_make_all_units_of_a_space_alike(network):
    """Whatever is nested how: every universe unit becomes the mean of all units."""
    structure, state = network.structure, network.state(1)
    uniform: dict[str, Coupling] = {}
    for space in structure.spaces:
        if space.parent is None:
            uniform[space.name] = Plan(torch.full((space.size, space.size), 1 / space.size, dtype=torch.float64))
        else:
            outer = uniform[space.parent].matrix()
            shape = (*outer.shape, space.block, space.block)
            uniform[space.name] = NestedPlan(outer, torch.full(shape, 1 / space.block, dtype=torch.float64))
    first = transport(state, structure, uniform)
    again = transport(transport(state, structure, random_couplings(structure, 2)), structure, uniform)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, again[name])
        assert tensor.shape == state[name].shape


@pytest.mark.parametrize("network", [GROUPED, DEEP], ids=str)
def test_rows_by_block_are_the_rows_of_the_carried_network(network):
    """Hard maps: what the coupled blocks are compared by is what transport makes of them."""
    structure, state, hard = network.structure, network.state(1), random_couplings(network.structure, 3)
    maps = {name: c.source[None] for name, c in hard.items()}
    nested = as_plans(structure, hard)
    inner = {name: c.inner[None] for name, c in nested.items() if isinstance(c, NestedPlan)}
    moved = transport(state, structure, hard)
    places = [p for p in structure.places if partners(structure, p)]
    assert len(places) == 2
    for place in places:
        rows = carried_rows(state[place.tensor][None], structure, place, Maps(maps, inner))[0]
        expected = carried_rows(moved[place.tensor][None], structure, place, Maps())[0]
        source, block = hard[place.space].source, len(hard[place.space]) // len(rows)
        for u, unit in enumerate(source.tolist()):
            assert torch.equal(rows[u // block, unit], expected[u // block, u])


def test_integers_do_not_go_along_soft_couplings():
    state = GROUPED.state(1)
    state["0.bias"] = (100 * state["0.bias"]).long()
    with pytest.raises(AlignmentError, match=r"0\.bias holds torch\.int64 .* give that space a permutation"):
        transport(state, GROUPED.structure, soft_couplings(GROUPED.structure))
    hard = random_couplings(GROUPED.structure, 1)
    moved = transport(state, GROUPED.structure, hard)["0.bias"]
    assert torch.equal(moved, state["0.bias"][hard["0"].source])


def test_half_precision_stays_and_is_rounded_once():
    state, couplings = MLP.state(1), soft_couplings(MLP.structure)
    exact = transport(state, MLP.structure, couplings)
    for name, tensor in transport({n: t.half() for n, t in state.items()}, MLP.structure, couplings).items():
        assert tensor.dtype == torch.float16
        torch.testing.assert_close(tensor.double(), exact[name], rtol=2e-3, atol=2e-3)


def test_couplings_of_the_wrong_kind_are_refused():
    structure, state, soft = GROUPED.structure, GROUPED.state(1), soft_couplings(GROUPED.structure)
    flat = Plan(plans(12, 12, seed=0))
    with pytest.raises(AlignmentError, match="'0' is nested in '0/blocks'; give a NestedPlan"):
        transport(state, structure, soft | {"0": flat})
    with pytest.raises(AlignmentError, match="'0/blocks' is not nested"):
        transport(state, structure, soft | {"0/blocks": NestedPlan(plans(1, 1, seed=0), plans(1, 1, 3, 3, seed=0))})
    with pytest.raises(AlignmentError, match="'0': its coupling does not keep the blocks of '0/blocks' together"):
        transport(state, structure, soft | {"0/blocks": Plan(plans(3, 3, seed=9))})
    wide = Plan(torch.full((9, 6), 1 / 6), columns=torch.full((6,), 1.5))
    with pytest.raises(AlignmentError, match="9 in the universe, and its coupling brings it to 6"):
        transport(MLP.state(1), MLP.structure, {MLP.structure.spaces[0].name: wide})


def test_blocks_do_not_move_without_what_is_nested_in_them():
    with pytest.raises(AlignmentError, match="does not keep the blocks"):
        transport(GROUPED.state(1), GROUPED.structure, {"0/blocks": Permutation(torch.tensor([1, 2, 0]))})


@pytest.mark.parametrize("hard_inside", [False, True])
@pytest.mark.parametrize("network", [MLP, GROUPED, ATTENTION, DEEP], ids=str)
def test_soft_alignments_survive_a_file_bit_for_bit(network, hard_inside, tmp_path):
    structure = network.structure
    hard = {s.name: Permutation.identity(s.size) for s in structure.spaces}
    couplings = {"a": hard, "b/c": soft_couplings(structure, hard_inside=hard_inside)}
    alignment = Alignment(couplings, "by hand", {"converged": False})
    alignment.save(tmp_path / "alignment.safetensors")
    again = Alignment.load(tmp_path / "alignment.safetensors")
    assert again.couplings == alignment.couplings
    assert again.method == "by hand"
    for space, coupling in again["b/c"].items():
        assert type(coupling) is type(couplings["b/c"][space])
    expected = transport(network.state(1), structure, alignment["b/c"])
    for name, tensor in transport(network.state(1), structure, again["b/c"]).items():
        assert torch.equal(tensor, expected[name])
    assert again.moved["a"] == 0
    assert 0 < again.moved["b/c"] < 1


def test_files_of_permutations_without_parts_are_read(tmp_path):
    metadata = {"content": "weldnet-alignment", "networks": '["a"]', "method": "", "stats": "{}"}
    save_file({"0/x/y": torch.tensor([1, 0])}, tmp_path / "old.safetensors", metadata=metadata)
    assert Alignment.load(tmp_path / "old.safetensors")["a"]["x/y"] == Permutation(torch.tensor([1, 0]))


def test_files_with_parts_of_nothing_are_refused(tmp_path):
    path = tmp_path / "alignment.safetensors"
    Alignment({"a": {"x": Plan(torch.eye(2))}}).save(path)
    tensors = {key: t for key, t in load_file(path).items() if "rows" not in key}
    metadata = {"content": "weldnet-alignment", "networks": '["a"]', "method": "", "stats": "{}"}
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError, match="no coupling is made of"):
        Alignment.load(path)


def test_the_universe_takes_the_order_of_a_network_with_permutations_only():
    structure = GROUPED.structure
    alignment = Alignment({"a": random_couplings(structure, 1), "b": soft_couplings(structure)})
    turned = alignment.relative_to("a")
    states = {name: GROUPED.state(seed) for seed, name in enumerate("ab")}
    for space in structure.spaces:
        assert turned["a"][space.name] == Permutation.identity(space.size)
    back = {space: p.inverse() for space, p in alignment["a"].items()}
    in_universe = transport(states["b"], structure, alignment["b"])
    for name, tensor in transport(states["b"], structure, turned["b"]).items():
        torch.testing.assert_close(tensor, transport(in_universe, structure, back)[name])
    with pytest.raises(AlignmentError, match="coupling of 'b' is soft and has no inverse"):
        alignment.relative_to("b")


# -- on the way to permutations --------------------------------------------------------------------


def annealed(network: Network, tau: float) -> ascent_file.Ascent:
    ascent = ascent_file.start(Problem(network.structure, three(network)), "root")
    ascent.soften()
    rule = gamf._Soft(tau, 200, {})
    for root in network.structure.roots:
        gamf._visit(ascent, InnerProduct(), root, rule)
    return ascent


@pytest.mark.parametrize("tau", [1.0, 0.2])
@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_soft_couplings_have_marginals_of_one_and_keep_to_their_blocks(network, tau):
    ascent = annealed(network, tau)
    for space in network.structure.spaces:
        for k, whole in enumerate(ascent.couplings[space.name]):
            for axis in (0, 1):
                torch.testing.assert_close(whole.sum(axis), torch.ones(space.size), rtol=0, atol=2e-2)
            assert float((whole - 1 / space.size).abs().max()) > 1e-3, "nothing was learned"
            if space.parent is not None:
                expected = unfold(ascent.couplings[space.parent][k], ascent.inner[space.name][k])
                assert torch.equal(whole, expected)


@pytest.mark.parametrize("network", NESTED, ids=str)
def test_plans_do_not_depend_on_the_numbering(network):
    """The first network is the universe: renumber the others, and the rows of their plans are renumbered."""
    planted = random_couplings(network.structure, 4)
    states = three(network)
    names = sorted(states)
    moved = states | {n: transport(states[n], network.structure, planted) for n in names[1:]}
    found: list[ascent_file.Ascent] = []
    for networks in (states, moved):
        ascent = ascent_file.start(Problem(network.structure, networks), "root")
        ascent.soften()
        rule = gamf._Soft(0.5, 50, {})
        for root in network.structure.roots * 2:
            gamf._visit(ascent, Gaussian(4.0), root, rule)
        found.append(ascent)
    for space in network.structure.spaces:
        expected = found[0].couplings[space.name][:, planted[space.name].source]
        torch.testing.assert_close(found[1].couplings[space.name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kernel", [InnerProduct(), Gaussian(4.0, 0)], ids=repr)
@pytest.mark.parametrize("network", NESTED, ids=str)
def test_hard_visits_never_go_down(network, kernel):
    states = {name: state for name, state in three(network).items() if name != "c"}
    ascent = ascent_file.start(Problem(network.structure, states), "root")
    structure, gains = network.structure, []
    for _ in range(3):
        for root in structure.roots:
            tree = structure.tree(root.name)
            before, old = ascent.fit(tree, kernel, 1), {name: c.clone() for name, c in ascent.couplings.items()}
            with Assignments(1) as assignments:
                moved = assign(ascent, [root], kernel, assignments)
            gains.append((ascent.fit(tree, kernel, 1) - before) / abs(before))
            assert gains[-1] >= -1e-6
            assert moved or all(torch.equal(c, old[name]) for name, c in ascent.couplings.items())
    assert max(gains) > 0, "nothing was gained"


@pytest.mark.parametrize("network", NESTED, ids=str)
def test_hard_visits_of_three_networks_never_go_down(network):
    ascent = ascent_file.start(Problem(network.structure, three(network)), "root")
    values = [ascent.objective()]
    for root in network.structure.roots * 3:
        with Assignments(1) as assignments:
            assign(ascent, [root], InnerProduct(), assignments)
        values.append(ascent.objective())
    assert all(after >= before - 1e-6 for before, after in itertools.pairwise(values))
    assert values[-1] > values[0], "nothing was gained"


@pytest.mark.parametrize("network", NESTED, ids=str)
def test_annealing_ends_in_permutations(network):
    alignment = Gamf()(Problem(network.structure, three(network)))
    assert all(isinstance(c, Permutation) for couplings in alignment.couplings.values() for c in couplings.values())
