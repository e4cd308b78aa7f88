"""Optimal transport: plans against POT's own, and the method's options on networks."""

from __future__ import annotations

import warnings

import ot
import pytest
import torch
from torch import nn

import weldnet
from test_laws import (
    ATTENTION,
    GROUPED,
    MLP,
    NETWORKS,
    Network,
    fused_outputs,
    law_anchor,
    law_equivariance,
    law_purity,
    law_recovery,
    law_round_trip,
    law_self,
    law_settles,
    three,
)
from test_widths import EVEN, wider
from weldnet.alignment import Alignment, OptimalTransport, Problem, transport
from weldnet.assignment import Permutation, Plan, best_permutation, entropic_plan, exact_plan
from weldnet.errors import AlignmentError, UsageError


def random_costs(m: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    rows, columns = (torch.rand(size, generator=g, dtype=torch.float64) + 0.1 for size in (m, n))
    return torch.rand(m, n, generator=g, dtype=torch.float64) * 7, rows / rows.sum() * n, columns / columns.sum() * n


# -- plans -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), [(5, 5), (12, 7), (7, 12), (1, 4), (30, 20)])
@pytest.mark.parametrize("seed", range(3))
def test_exact_plans_are_pots(m, n, seed):
    cost, a, b = random_costs(m, n, seed)
    plan = exact_plan(cost, a, b)
    expected = ot.emd((a / n).numpy(), (b / n).numpy(), cost.numpy())
    torch.testing.assert_close(plan / n, torch.from_numpy(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(plan.sum(1), a)
    torch.testing.assert_close(plan.sum(0), b)


@pytest.mark.parametrize("size", [4, 17])
def test_with_equal_widths_and_weights_the_exact_plan_is_the_best_permutation(size):
    cost, *_ = random_costs(size, size, 3)
    ones = torch.ones(size, dtype=torch.float64)
    expected = Permutation(best_permutation(-cost)).matrix()
    torch.testing.assert_close(exact_plan(cost, ones, ones), expected)


@pytest.mark.parametrize(("m", "n"), [(6, 6), (9, 5), (5, 9)])
@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.03])
def test_entropic_plans_are_pots(m, n, epsilon):
    cost, a, b = random_costs(m, n, 1)
    plan, met = entropic_plan(cost, a, b, epsilon, iterations=20000)
    scaled = (cost / cost.max()).numpy()
    expected = ot.sinkhorn((a / n).numpy(), (b / n).numpy(), scaled, epsilon, numItermax=20000, stopThr=1e-14)
    assert met
    torch.testing.assert_close(plan / n, torch.from_numpy(expected), rtol=0, atol=1e-8)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-6, 1e-12, 1e-300])
def test_tiny_epsilons_do_not_overflow_and_keep_the_marginals(epsilon):
    cost, a, b = random_costs(20, 15, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan, _ = entropic_plan(cost * 1e6, a, b, epsilon, iterations=50)
    assert bool(torch.isfinite(plan).all())
    torch.testing.assert_close(plan.sum(1), a)
    torch.testing.assert_close(plan.sum(0), b)
    Plan(plan, a, b)


def test_small_epsilons_approach_the_exact_plan():
    cost, a, b = random_costs(8, 6, 4)
    exact = float((exact_plan(cost, a, b) * cost).sum())
    worth = [float((entropic_plan(cost, a, b, e, iterations=50000)[0] * cost).sum()) for e in (0.3, 0.03, 0.003)]
    assert worth[0] > worth[1] > worth[2] >= exact - 1e-9
    assert worth[2] == pytest.approx(exact, rel=0.01)


def test_what_has_no_plan_is_refused():
    cost, a, b = random_costs(4, 3, 0)
    with pytest.raises(UsageError, match=r"epsilon is 0\.0; give a share of the largest cost above 0"):
        entropic_plan(cost, a, b, 0.0)
    with pytest.raises(AlignmentError, match="the rows sum to 6, the columns to 3"):
        exact_plan(cost, a * 2, b)
    with pytest.raises(AlignmentError, match="marginals of the columns are not all above 0"):
        exact_plan(cost, a, b * torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(AlignmentError, match="not finite"):
        exact_plan(cost * float("nan"), a, b)


# -- the method's options ----------------------------------------------------------------------------

HARD = [
    OptimalTransport(on="activations", samples=32),
    OptimalTransport(cost="cosine"),
    OptimalTransport(cost="squared", normalise=True),
    OptimalTransport(barycentre=True),
]
SOFT = [
    OptimalTransport(plan="entropic", epsilon=0.05),
    OptimalTransport(marginals="norm"),
    OptimalTransport(plan="entropic", on="activations", samples=32, marginals="norm"),
    OptimalTransport(plan="entropic", barycentre=True, epsilon=0.2),
]


@pytest.mark.parametrize("network", NETWORKS, ids=str)
@pytest.mark.parametrize("method", HARD, ids=weldnet.alignment.describe)
def test_hard_variants_keep_the_laws(method, network):
    law_self(method, network)
    law_recovery(method, network)
    law_anchor(method, network)
    law_settles(method, network)


@pytest.mark.parametrize("network", [MLP, NETWORKS[1], GROUPED], ids=str)
@pytest.mark.parametrize("method", [*HARD, *SOFT], ids=weldnet.alignment.describe)
def test_variants_are_pure_and_equivariant_and_survive_a_file(method, network):
    law_purity(method, network)
    law_equivariance(method, network)
    law_round_trip(Alignment.save, Alignment.load, method, network)


@pytest.mark.parametrize("method", SOFT, ids=weldnet.alignment.describe)
def test_soft_couplings_have_the_marginals_that_they_declare(method):
    alignment = method(MLP.problem(three(MLP)))
    for name in "bc":
        for coupling in alignment[name].values():
            assert isinstance(coupling, Plan)
            torch.testing.assert_close(coupling.values.sum(1), coupling.rows, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(coupling.values.sum(0), coupling.columns, rtol=1e-6, atol=1e-9)
            assert bool((coupling.rows == 1).all()) == (method.marginals == "uniform")


def test_sharp_entropic_plans_of_copies_are_nearly_identities():
    state = MLP.state(1)
    alignment = OptimalTransport(plan="entropic", epsilon=0.005)(MLP.problem({"a": state, "b": state}))
    for coupling in alignment["b"].values():
        torch.testing.assert_close(coupling.matrix(), torch.eye(len(coupling)).double(), rtol=0, atol=1e-3)


def test_spaces_with_blocks_get_permutations_in_any_case():
    alignment = OptimalTransport(plan="entropic")(ATTENTION.problem(three(ATTENTION)))
    nested = {s.name for s in ATTENTION.structure.spaces if s.parent or ATTENTION.structure.children(s.name)}
    assert nested
    for space, coupling in alignment["b"].items():
        assert isinstance(coupling, Permutation if space in nested else Plan), space


def test_one_pass_carries_the_plans_found_before():
    """Hidden spaces behind the first cannot be compared at all without them."""
    original = MLP.state(1)
    hidden = MLP.structure.spaces[1].name
    roll = {s.name: Permutation(torch.arange(s.size).roll(2)) for s in MLP.structure.spaces}
    states = {"a": original, "b": transport(original, MLP.structure, roll)}
    bare = {n: {k: (torch.zeros_like(t) if k.endswith("bias") else t) for k, t in s.items()} for n, s in states.items()}
    alignment = OptimalTransport()(Problem(MLP.structure, bare))
    assert alignment["b"][hidden] == roll[hidden].inverse()


def test_the_barycentre_lies_between_its_networks():
    """With two equal networks of three, the third moves to them and they do not move to it."""
    network = Network("one layer", lambda w: nn.Sequential(nn.Linear(3, w), nn.ReLU(), nn.Linear(w, 2)), 5, (4, 3))
    a, b = network.state(0), network.state(1)
    found = OptimalTransport(barycentre=True)(Problem(network.structure, {"a": a, "b": b, "c": a}))
    assert found["c"] == found["a"]
    entropic = OptimalTransport(barycentre=True, plan="entropic", epsilon=0.05)
    soft = entropic(Problem(network.structure, {"a": a, "b": b, "c": a}))
    assert soft.soft == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize("method", [*HARD, *SOFT], ids=weldnet.alignment.describe)
def test_all_variants_take_other_widths(method):
    wide = wider(EVEN)
    states = {"a": EVEN.state(0), "b": wide.state(1), "c": EVEN.state(2)}
    modules = {"a": EVEN.loaded(states["a"]), "b": wide.loaded(states["b"]), "c": EVEN.loaded(states["c"])}
    problem = Problem(EVEN.structure, states, networks=modules, data=EVEN.unlabelled, structures={"b": wide.structure})
    alignment = method(problem)
    moved = transport(states["b"], wide.structure, alignment["b"], EVEN.structure)
    assert {n: t.shape for n, t in moved.items()} == {n: t.shape for n, t in states["a"].items()}
    assert all(bool(torch.isfinite(t).all()) for t in moved.values())


def test_dead_units_and_equal_units_are_no_trouble():
    state = {name: torch.zeros_like(t) for name, t in MLP.state(1).items()}
    for method in (OptimalTransport(), *HARD, *SOFT):
        alignment = method(MLP.problem({"a": state, "b": MLP.state(2)}))
        moved = transport(MLP.state(2), MLP.structure, alignment["b"])
        assert all(bool(torch.isfinite(t).all()) for t in moved.values())


def test_fuse_says_that_soft_couplings_are_not_proven():
    result = weldnet.fuse([MLP.model(0), MLP.model(1)], MLP.inputs, method="optimal_transport", plan="entropic")
    assert any("the couplings of b are soft" in note for note in result.report.notes)
    assert [row.equivalence is None for row in result.report.rows[:2]] == [False, True]
    assert "optimal_transport plan='entropic'" in str(result)
    hard = weldnet.fuse([MLP.model(0), MLP.model(1)], MLP.inputs, method="optimal_transport")
    assert not any("soft" in note for note in hard.report.notes)
    assert all(row.equivalence <= 1e-9 for row in hard.report.rows[:2])


def test_activations_come_from_the_data_of_fuse():
    networks = [MLP.model(0), MLP.loaded(weldnet.alignment.transport(MLP.state(0), MLP.structure, {}))]
    result = weldnet.fuse(networks, MLP.inputs, method="optimal_transport", on="activations", data=MLP.unlabelled)
    assert result.alignment.moved == {"a": 0, "b": 0}
    assert not any("was not used" in note for note in result.report.notes)
    with pytest.raises(UsageError, match=r"optimal_transport on=.*activations.* has not got unlabelled inputs"):
        weldnet.fuse(networks, MLP.inputs, method="optimal_transport", on="activations")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epsilon": 0.0}, r"epsilon is 0\.0; give above 0"),
        ({"epsilon": -1.0}, "epsilon is -1"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
        ({"on": "gradients"}, "on is 'gradients'; give weights or activations"),
        ({"cost": "l3"}, "cost is 'l3'; give euclidean, squared, cosine"),
        ({"plan": "sinkhorn"}, "plan is 'sinkhorn'; give exact or entropic"),
        ({"marginals": "mass"}, "marginals is 'mass'; give uniform or norm"),
        ({"samples": 0}, "samples is 0; give 1 or more"),
        ({"iterations": 0}, "iterations is 0; give 1 or more"),
    ],
)
def test_bad_options_are_named(options, says):
    with pytest.raises(UsageError, match=says):
        OptimalTransport(**options)


def test_only_activations_need_data():
    assert not OptimalTransport().needs_data
    assert OptimalTransport(on="activations").needs_data
    outputs = fused_outputs(OptimalTransport(on="activations", samples=16), MLP, three(MLP))
    assert bool(torch.isfinite(outputs).all())
