"""What sinkhorn_rebasin promises beyond the laws that all methods keep."""

from __future__ import annotations

import itertools

import pytest
import torch

import weldnet
from test_laws import DEEP, GROUPED, MLP, NETWORKS, renumbered, three
from weldnet.alignment import Problem, SinkhornRebasin, make_method, transport
from weldnet.alignment._ascent import start
from weldnet.alignment.sinkhorn_rebasin import _Distance, _Tables
from weldnet.errors import DataError, UsageError

RESIDUAL, ATTENTION = NETWORKS[1], NETWORKS[7]
SHORT = {"steps": 20, "epochs": 2}


@pytest.mark.parametrize("network", [RESIDUAL, ATTENTION, DEEP], ids=str)
def test_plans_stay_doubly_stochastic_and_the_distance_falls(network):
    ascent = start(Problem(network.structure, three(network)), "root")
    tables = _Tables.of(ascent, 1.0, 20)
    losses = tables.descend([_Distance(ascent, product=False)] * 20, 0.1)
    assert losses[-1] < 0.99 * losses[0]
    plans = tables.plans()
    for plan in (*plans.whole.values(), *plans.inner.values()):
        assert bool((plan >= 0).all())
        for axis in (-1, -2):
            torch.testing.assert_close(plan.sum(axis), torch.ones_like(plan.sum(axis)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("product", [False, True])
def test_the_loss_of_permutations_is_what_the_networks_weights_say(product):
    """By hand: over all pairs, in parts of the norms."""
    states = three(GROUPED)
    ascent = start(Problem(GROUPED.structure, states), "raw")
    names = [n for n in states["a"] if GROUPED.structure.places_in(n)]
    flat = [torch.cat([state[n].flatten() for n in names]) for state in states.values()]
    pairs = list(itertools.combinations(flat, 2))
    value = -sum(float(a @ b) for a, b in pairs) if product else sum(float((a - b).square().sum()) for a, b in pairs)
    scale = 2 * sum(float(a @ a) for a in flat)
    found = float(_Distance(ascent, product=product)(ascent.maps()))
    assert found == pytest.approx(value / scale, rel=1e-4)


@pytest.mark.parametrize("loss", ["midpoint", "random"])
def test_learning_by_outputs_brings_the_average_closer_to_the_parents(loss):
    states = three(MLP)
    method = SinkhornRebasin(loss=loss, steps=50, epochs=20)
    problem = MLP.problem(states)
    stats = method(problem).stats
    assert stats["loss"] < 0.95 * stats["first_loss"]
    assert method(problem).couplings == method(problem).couplings


@pytest.mark.parametrize("loss", ["distance", "product", "midpoint", "random"])
def test_planted_copies_come_back_by_every_loss(loss):
    original = MLP.state(1)
    states = {"a": original, "b": renumbered(MLP, original, 3)}
    alignment = SinkhornRebasin(loss=loss, epochs=1)(MLP.problem(states))
    back = transport(states["b"], MLP.structure, alignment["b"])
    assert all(torch.equal(back[key], tensor) for key, tensor in original.items())


def test_it_needs_data_by_outputs_only():
    networks = [MLP.model(0), MLP.model(1)]
    weldnet.align(networks, MLP.structure, method="sinkhorn_rebasin", steps=1)
    with pytest.raises(UsageError, match="data="):
        weldnet.align(networks, MLP.structure, method="sinkhorn_rebasin", loss="random")
    with pytest.raises(DataError, match="2 inputs or more"):
        weldnet.align(
            networks, MLP.structure, method="sinkhorn_rebasin", loss="midpoint", data=MLP.unlabelled[:1], **SHORT
        )


@pytest.mark.parametrize(
    ("option", "value"),
    [("loss", "l2"), ("steps", 0), ("epochs", 0), ("rate", 0.0), ("temperature", -1.0), ("iterations", 0),
     ("weighting", "none"), ("samples", 1), ("batch_size", 1)],
)  # fmt: skip
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(UsageError, match=f"sinkhorn_rebasin: {option} is {value!r}; give "):
        make_method("sinkhorn_rebasin", **{option: value})
