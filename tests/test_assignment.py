"""Assignment against brute force, and Sinkhorn against POT."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weldnet.assignment import (
    NestedPlan,
    Permutation,
    Plan,
    as_blocks,
    best_inside,
    best_permutation,
    block_sinkhorn,
    fit_inside,
    sinkhorn,
    standardise,
    unfold,
)
from weldnet.assignment import _sinkhorn as sinkhorn_file
from weldnet.errors import AlignmentError

LAW = settings(max_examples=30, deadline=None, derandomize=True)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def value(scores: Tensor, source: Tensor) -> float:
    return float(scores.double()[source, torch.arange(len(source))].sum())


# -- the linear assignment -------------------------------------------------------------------------


@LAW
@given(n=st.integers(1, 6), seed=st.integers(0, 999), ties=st.booleans())
def test_best_permutation_is_the_best_of_all(n, seed, ties):
    scores = normal(n, n, seed=seed)
    scores = scores.round() if ties else scores
    every = [value(scores, torch.tensor(p)) for p in itertools.permutations(range(n))]
    source = best_permutation(scores)
    assert sorted(source.tolist()) == list(range(n))
    assert value(scores, source) == pytest.approx(max(every), abs=1e-12)


def test_best_permutation_maps_universe_units_to_network_units():
    scores = torch.zeros(3, 3)
    scores[2, 0] = scores[0, 1] = scores[1, 2] = 1  # network unit 2 fits universe unit 0, and so on
    assert best_permutation(scores).tolist() == [2, 0, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_refused(bad):
    scores = torch.zeros(3, 3)
    scores[1, 2] = bad
    with pytest.raises(AlignmentError, match=r"\(3, 3\).*NaN or Inf"):
        best_permutation(scores)


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (4,)])
def test_scores_that_are_not_square_are_refused(shape):
    with pytest.raises(AlignmentError, match="square"):
        best_permutation(torch.zeros(shape))


# -- nested assignment -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Nest:
    """Scores of a space and of the spaces whose blocks are its units."""

    name: str
    scores: Tensor
    children: tuple[Nest, ...] = ()


def best_nested(nest: Nest) -> dict[str, Tensor]:
    """Put the pieces together, from the leaves up."""
    inner: dict[str, Tensor] = {}

    def total(nest: Nest) -> Tensor:
        scores = nest.scores
        for child in nest.children:
            blocks = as_blocks(total(child), len(nest.scores))
            inner[child.name] = best_inside(blocks)
            scores = scores + fit_inside(inner[child.name], blocks)
        return scores

    def descend(nest: Nest, source: Tensor) -> dict[str, Tensor]:
        found = {nest.name: source}
        for child in nest.children:
            found |= descend(child, unfold(source, inner[child.name]))
        return found

    return descend(nest, best_permutation(total(nest)))


def every_nested(nest: Nest, source: tuple[int, ...]) -> Iterator[dict[str, tuple[int, ...]]]:
    """All renumberings of a nest whose own units are renumbered by ``source``."""
    choices = []
    for child in nest.children:
        block = len(child.scores) // len(source)
        inner = itertools.product(itertools.permutations(range(block)), repeat=len(source))
        options = []
        for parts in inner:
            moved = tuple(a * block + i for a, part in zip(source, parts, strict=True) for i in part)
            options.extend(every_nested(child, moved))
        choices.append(options)
    for combination in itertools.product(*choices):
        yield {nest.name: source} | {name: s for found in combination for name, s in found.items()}


def nest_value(nest: Nest, found: dict[str, Tensor]) -> float:
    return value(nest.scores, found[nest.name]) + sum(nest_value(child, found) for child in nest.children)


NESTS = {
    "2 blocks of 2": lambda s: Nest("p", normal(2, 2, seed=s), (Nest("c", normal(4, 4, seed=s + 50)),)),
    "2 blocks of 3": lambda s: Nest("p", normal(2, 2, seed=s), (Nest("c", normal(6, 6, seed=s + 50)),)),
    "3 blocks of 2": lambda s: Nest("p", normal(3, 3, seed=s), (Nest("c", normal(6, 6, seed=s + 50)),)),
    "3 blocks of 3": lambda s: Nest("p", normal(3, 3, seed=s), (Nest("c", normal(9, 9, seed=s + 50)),)),
    "two children": lambda s: Nest(
        "p", normal(2, 2, seed=s), (Nest("c", normal(4, 4, seed=s + 50)), Nest("d", normal(6, 6, seed=s + 90)))
    ),
    "depth 2": lambda s: Nest(
        "p", normal(2, 2, seed=s), (Nest("c", normal(4, 4, seed=s + 50), (Nest("g", normal(8, 8, seed=s + 90)),)),)
    ),
    "no own scores": lambda s: Nest("p", torch.zeros(3, 3), (Nest("c", normal(6, 6, seed=s)),)),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", NESTS.values(), ids=NESTS)
def test_nested_permutations_are_the_best_of_all_that_keep_blocks_together(make, seed):
    nest = make(seed)
    every = [
        {name: torch.tensor(s) for name, s in found.items()}
        for outer in itertools.permutations(range(len(nest.scores)))
        for found in every_nested(nest, outer)
    ]
    found = best_nested(nest)
    assert any(all(torch.equal(found[name], one[name]) for name in one) for one in every)
    assert nest_value(nest, found) == pytest.approx(max(nest_value(nest, one) for one in every), abs=1e-12)


def test_large_blocks_take_the_assignment_and_agree_with_the_enumeration(monkeypatch):
    nest = Nest("p", normal(3, 3), (Nest("c", normal(12, 12, seed=1)),))
    expected = best_nested(nest)
    monkeypatch.setattr("weldnet.assignment._nested._ENUMERATED", 0)
    found = best_nested(nest)
    assert nest_value(nest, found) == pytest.approx(nest_value(nest, expected), abs=1e-12)


def test_a_planted_nested_permutation_is_found():
    parent, inner = torch.tensor([2, 0, 1]), torch.tensor([1, 3, 0, 2, 4])
    child = torch.cat([a * 5 + inner.roll(u) for u, a in enumerate(parent.tolist())])
    scores = torch.zeros(15, 15)
    scores[child, torch.arange(15)] = 1
    found = best_nested(Nest("p", torch.zeros(3, 3), (Nest("c", scores),)))
    assert torch.equal(found["p"], parent)
    assert torch.equal(found["c"], child)


def uneven(*shape: int, seed: int = 0) -> Tensor:
    """Plans of the given shape (..., n, n), far from uniform."""
    return converged(normal(*shape, seed=seed), 0.5)


def test_an_unfolded_coupling_is_the_outer_times_the_inner_one():
    outer, inner = uneven(3, 3), uneven(3, 3, 2, 2, seed=1)
    whole = unfold(outer, inner)
    for a, u, i, j in itertools.product(range(3), range(3), range(2), range(2)):
        assert float(whole[2 * a + i, 2 * u + j]) == pytest.approx(float(outer[a, u] * inner[a, u, i, j]), abs=1e-15)
    torch.testing.assert_close(whole.sum(0), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-4)


def test_hard_and_soft_ways_to_unfold_agree():
    outer, inner = torch.tensor([2, 0, 1]), torch.stack([torch.randperm(4) for _ in range(9)]).reshape(3, 3, 4)
    whole = Permutation(unfold(outer, inner)).matrix()
    assert torch.equal(unfold(Permutation(outer).matrix(), inner), whole)
    dense = torch.stack([Permutation(p).matrix() for p in inner.reshape(9, 4)]).reshape(3, 3, 4, 4)
    assert torch.equal(unfold(Permutation(outer).matrix(), dense), whole)
    scores = as_blocks(normal(12, 12), 3)
    torch.testing.assert_close(fit_inside(inner, scores), fit_inside(dense, scores))


def test_inner_plans_are_the_plans_of_every_pair():
    blocks = normal(3, 3, 4, 4)
    found = block_sinkhorn(blocks, 0.5, iterations=5000)
    centred = blocks - blocks.mean(-1, keepdim=True)
    centred = centred - centred.mean(-2, keepdim=True)
    deviation = centred.square().mean().sqrt()  # of all pairs together
    for a, u in itertools.product(range(3), range(3)):
        expected = converged(centred[a, u] / deviation, 0.5)
        torch.testing.assert_close(found.plans[a, u], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("temperature", [2.0, 0.3])
def test_the_value_of_a_pair_is_its_free_energy_in_the_unit_of_the_scores(temperature):
    blocks = 7 * normal(3, 3, 4, 4) + 5 * normal(3, 3, 1, 4, seed=1)
    found = block_sinkhorn(blocks, temperature, iterations=5000)
    centred = blocks - blocks.mean(-1, keepdim=True)
    unit = temperature * (centred - centred.mean(-2, keepdim=True)).square().mean().sqrt()
    entropy = -(found.plans * found.plans.log()).sum((-2, -1))
    torch.testing.assert_close(found.values, fit_inside(found.plans, blocks) + unit * entropy, rtol=2e-3, atol=2e-3)


def test_renumbering_commutes_with_inner_plans():
    scores, p, q = normal(12, 12), torch.tensor([2, 0, 1]), torch.stack([torch.randperm(4) for _ in range(9)])
    move = unfold(p, q.reshape(3, 3, 4))
    first, then = (block_sinkhorn(as_blocks(s, 3), 0.3) for s in (scores, scores[move]))
    torch.testing.assert_close(then.values, first.values[p])
    whole = [unfold(torch.ones(3, 3, dtype=torch.float64), found.plans) for found in (first, then)]
    torch.testing.assert_close(whole[1], whole[0][move])


def test_equal_scores_inside_blocks_leave_inner_plans_uniform():
    found = block_sinkhorn(normal(3, 3, 1, 1).expand(3, 3, 4, 4), 0.1)
    torch.testing.assert_close(found.plans, torch.full((3, 3, 4, 4), 0.25, dtype=torch.float64))


# -- Sinkhorn --------------------------------------------------------------------------------------


def converged(scores: Tensor, temperature: float, **options: object) -> Tensor:
    return sinkhorn(scores, temperature, iterations=20000, tolerance=1e-12, **options)[0]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("temperature", [5.0, 1.0, 0.3, 0.1])
def test_sinkhorn_agrees_with_pot(temperature):
    scores = normal(9, 9)
    ones = np.ones(9)
    expected = ot.sinkhorn(
        ones, ones, -scores.numpy(), temperature, method="sinkhorn_log", stopThr=1e-13, numItermax=50000
    )
    torch.testing.assert_close(converged(scores, temperature), torch.from_numpy(expected), rtol=1e-6, atol=1e-9)


def test_the_log_domain_agrees_with_pot():
    scores, zero = normal(9, 9), torch.zeros(9, dtype=torch.float64)
    plan, _ = sinkhorn_file._log_sinkhorn(scores, 0.2, 5000, sinkhorn_file.Potentials(zero, zero))
    ones = np.ones(9)
    expected = ot.bregman.sinkhorn_log(ones, ones, -scores.numpy(), 0.2, stopThr=1e-13, numItermax=50000)
    torch.testing.assert_close(plan, torch.from_numpy(expected), rtol=1e-6, atol=1e-9)


@LAW
@given(n=st.integers(1, 12), temperature=st.floats(0.5, 10), seed=st.integers(0, 999))
def test_marginals_are_ones(n, temperature, seed):
    plan = converged(normal(n, n, seed=seed), temperature)
    assert bool((plan >= 0).all())
    torch.testing.assert_close(plan.sum(-2), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(plan.sum(-1), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_columns_are_exact_after_any_number_of_iterations(iterations):
    plan, _ = sinkhorn(normal(6, 6), 0.05, iterations=iterations)
    torch.testing.assert_close(plan.sum(0), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-12)


def test_potentials_give_the_plan():
    scores, temperature = normal(3, 8, 8), 0.4
    plan, (row, column) = sinkhorn(scores, temperature)
    torch.testing.assert_close(plan, ((scores - row.unsqueeze(-1) - column.unsqueeze(-2)) / temperature).exp())


def test_a_stack_is_solved_like_its_parts():
    scores = normal(3, 8, 8)
    together = converged(scores, 0.3)
    torch.testing.assert_close(together, torch.stack([converged(s, 0.3) for s in scores]), rtol=1e-7, atol=1e-10)


def test_a_warm_start_gives_the_same_plan_sooner():
    scores = normal(12, 12)
    _, warm = sinkhorn(scores + 0.01 * normal(12, 12, seed=1), 0.1, iterations=20000, tolerance=1e-10)
    torch.testing.assert_close(converged(scores, 0.1, start=warm), converged(scores, 0.1), rtol=1e-6, atol=1e-9)

    def error(plan: Tensor) -> float:
        return float((plan.sum(-1) - 1).abs().max())

    cold_plan, _ = sinkhorn(scores, 0.1, iterations=5)
    warm_plan, _ = sinkhorn(scores, 0.1, iterations=5, start=warm)
    assert error(warm_plan) < error(cold_plan) / 5


def test_a_warm_start_is_not_changed():
    scores = normal(5, 5)
    _, warm = sinkhorn(scores, 0.5)
    before = warm.row.clone(), warm.column.clone()
    sinkhorn(2 * scores, 0.1, start=warm)
    assert torch.equal(warm.row, before[0])
    assert torch.equal(warm.column, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-2, 1e-4, 1e-8])
def test_very_low_temperatures_do_not_overflow(dtype, temperature):
    scores = 100 * normal(4, 10, 10, dtype=dtype)
    plan, potentials = sinkhorn(scores, temperature, iterations=50)
    for tensor in (plan, *potentials):
        assert bool(torch.isfinite(tensor).all())
    torch.testing.assert_close(plan.sum(-2), torch.ones(4, 10, dtype=dtype), rtol=0, atol=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_a_low_temperature_is_near_the_best_permutation(seed):
    scores = standardise(normal(10, 10, seed=seed))
    warm = None
    plan = torch.empty(0)
    for temperature in (1.0, 0.3, 0.1, 0.03, 0.01, 0.003):
        plan, warm = sinkhorn(scores, temperature, iterations=3000, start=warm, tolerance=1e-9)
    best = Permutation(best_permutation(scores)).matrix()
    assert float((plan - best).abs().max()) < 0.05


def test_a_high_temperature_is_near_uniform():
    torch.testing.assert_close(
        converged(normal(6, 6), 1e6), torch.full((6, 6), 1 / 6, dtype=torch.float64), atol=1e-5, rtol=0
    )


def test_row_and_column_offsets_do_not_change_the_plan():
    scores = normal(7, 7)
    shifted = scores + 3 * normal(7, 1, seed=1) + 5 * normal(1, 7, seed=2)
    torch.testing.assert_close(converged(shifted, 0.3), converged(scores, 0.3), rtol=1e-6, atol=1e-9)


# -- standardise -----------------------------------------------------------------------------------


def test_standardised_scores_have_no_unit():
    scores = normal(2, 8, 8)
    once = standardise(scores)
    torch.testing.assert_close(once.mean(-1), torch.zeros(2, 8, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(once.mean(-2), torch.zeros(2, 8, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(once.square().mean((-2, -1)), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(standardise(once), once)


def test_scale_and_offsets_do_not_matter():
    scores = normal(8, 8)
    shifted = 1e-3 * scores + normal(8, 1, seed=1) + 5 * normal(1, 8, seed=2)
    torch.testing.assert_close(standardise(shifted), standardise(scores))


def test_the_members_of_a_stack_do_not_touch_one_another():
    scores = normal(2, 8, 8)
    scores[1] *= 1e6
    torch.testing.assert_close(standardise(scores)[0], standardise(scores[0]))


def test_renumbering_commutes_with_standardising():
    scores, p, q = normal(8, 8), torch.randperm(8), torch.randperm(8)
    torch.testing.assert_close(standardise(scores[p][:, q]), standardise(scores)[p][:, q])


def test_standardising_keeps_the_best_permutation():
    scores = normal(8, 8) + 10 * normal(8, 1, seed=1)
    assert torch.equal(best_permutation(standardise(scores)), best_permutation(scores))


@pytest.mark.parametrize("constant", [0.0, 1e-30, 1.0, 123456.7])
def test_equal_scores_become_zeros_not_amplified_noise(constant):
    scores = torch.full((6, 6), constant) + torch.arange(6)[:, None] * constant
    assert torch.equal(standardise(scores), torch.zeros(6, 6))


# -- permutations ----------------------------------------------------------------------------------

PERMUTATIONS = (
    st.integers(0, 8)
    .flatmap(lambda n: st.permutations(list(range(n))))
    .map(lambda p: torch.tensor(p, dtype=torch.int64))
)


@LAW
@given(source=PERMUTATIONS)
def test_a_permutation_and_its_inverse_undo_one_another(source):
    p, identity = Permutation(source), Permutation.identity(len(source))
    assert p.after(p.inverse()) == identity
    assert p.inverse().after(p) == identity
    assert p.inverse().inverse() == p
    assert torch.equal(p.inverse().matrix(), p.matrix().T)


@LAW
@given(data=st.data(), n=st.integers(1, 7))
def test_after_renumbers_twice(data, n):
    first, second = (Permutation(torch.tensor(data.draw(st.permutations(range(n))))) for _ in range(2))
    units = normal(n, 3)
    assert torch.equal(units[second.after(first).source], units[first.source][second.source])
    assert torch.equal(second.after(first).matrix(), first.matrix() @ second.matrix())


def test_a_matrix_has_network_units_as_rows_and_universe_units_as_columns():
    p = Permutation(torch.tensor([2, 0, 1]))
    assert p.matrix()[2, 0] == p.matrix()[0, 1] == p.matrix()[1, 2] == 1
    assert float(p.matrix().sum()) == 3
    assert torch.equal(
        p.matrix().T @ torch.tensor([10.0, 20.0, 30.0]).double(), torch.tensor([30.0, 10.0, 20.0]).double()
    )
    assert p.matrix(torch.float32).dtype == torch.float32


def test_moved_is_the_share_of_units_that_change_number():
    assert Permutation.identity(4).moved == 0
    assert Permutation(torch.tensor([1, 0, 2, 3])).moved == 0.5
    assert Permutation(torch.tensor([1, 2, 3, 0])).moved == 1
    assert Permutation.identity(0).moved == 0


def test_permutations_are_values():
    p, q = Permutation(torch.tensor([1, 0])), Permutation(torch.tensor([1, 0], dtype=torch.int32))
    assert p == q
    assert len({p, q, Permutation.identity(2)}) == 2
    assert p != Permutation.identity(2)
    assert p != Permutation.identity(3)
    assert p != [1, 0]


def test_a_permutation_does_not_follow_the_tensor_that_it_was_made_of():
    source = torch.tensor([1, 0])
    p = Permutation(source)
    source[0] = 0
    assert p.source.tolist() == [1, 0]


@pytest.mark.parametrize(
    "bad",
    [[0, 0], [1, 2], [-1, 0], [0, 2, 2], [[0, 1], [1, 0]], 3, [0.4, 1.2], [True, False, True]],
    ids=str,
)
def test_what_is_not_a_permutation_is_refused(bad):
    with pytest.raises(AlignmentError, match="permutation"):
        Permutation(torch.tensor(bad))


# -- plans -----------------------------------------------------------------------------------------


def test_a_plan_keeps_the_marginals_that_it_declares():
    plan = Plan(uneven(5, 5))
    torch.testing.assert_close(plan.matrix().sum(0), plan.columns, rtol=0, atol=2e-3)
    torch.testing.assert_close(plan.matrix().sum(1), plan.rows, rtol=0, atol=2e-3)
    assert plan.balanced
    assert 0 < plan.moved < 1
    wide = Plan(torch.full((2, 4), 0.5), rows=torch.full((2,), 2.0), columns=torch.ones(4))
    assert not wide.balanced
    assert len(wide) == 2


def test_a_hard_plan_moves_as_its_permutation():
    p = Permutation(torch.tensor([1, 0, 2, 3]))
    assert Plan(p.matrix()).moved == p.moved
    assert torch.equal(Plan(p.matrix()).matrix(), p.matrix())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (torch.full((3, 3), 0.5), "rows miss their marginals by up to 0.5"),
        (torch.tensor([[1.5, -0.5], [-0.5, 1.5]]), "below 0"),
        (torch.full((2, 2), float("nan")), "NaN"),
        (torch.eye(2, dtype=torch.int64), "int64"),
        (torch.ones(3), "shape"),
        (torch.full((2, 4), 0.5), "marginals"),
    ],
    ids=str,
)
def test_what_is_not_a_plan_is_refused(values, says):
    with pytest.raises(AlignmentError, match=says):
        Plan(values)


def test_plans_are_values_that_nobody_can_change():
    values = uneven(4, 4)
    plan = Plan(values)
    assert plan == Plan(values.clone())
    assert plan != Plan(values.T)
    assert len({plan, Plan(values.clone())}) == 1
    values[0, 0] = 9
    assert float(plan.values[0, 0]) != 9


@pytest.mark.parametrize("hard", [True, False])
def test_a_nested_plan_is_the_outer_times_the_inner_one(hard):
    outer, plans = uneven(3, 3), uneven(3, 3, 4, 4, seed=1)
    plan = NestedPlan(outer, best_inside(plans) if hard else plans)
    assert plan.hard_inside is hard
    assert len(plan) == 12
    assert plan.block == 4
    assert torch.equal(plan.matrix(), unfold(outer, plan.inner))
    assert plan == NestedPlan(outer, plan.inner)
    assert plan != NestedPlan(outer, plan.inner.flip(0))
    torch.testing.assert_close(plan.matrix().sum(0), torch.ones(12, dtype=torch.float64), rtol=0, atol=3e-3)


@pytest.mark.parametrize(
    ("outer", "inner", "says"),
    [
        (torch.eye(2), torch.zeros(2, 2, 3, dtype=torch.int64), "not permutations"),
        (torch.eye(2), torch.full((2, 2, 3, 3), 0.5), "inner plans"),
        (torch.eye(2), torch.full((3, 3, 2, 2), 0.5), r"\(2, 2\) and \(3, 3, 2, 2\)"),
        (torch.full((2, 2), 0.2), torch.full((2, 2, 2, 2), 0.5), "outer plan"),
    ],
    ids=str,
)
def test_what_is_not_a_nested_plan_is_refused(outer, inner, says):
    with pytest.raises(AlignmentError, match=says):
        NestedPlan(outer, inner)


@pytest.mark.parametrize("kind", ["permutation", "plan", "nested, hard inside", "nested"])
def test_a_renumbered_universe_renumbers_the_columns(kind):
    inner = torch.tensor([[1, 0, 2], [2, 1, 0]])[:, None].expand(2, 2, 3)
    back = Permutation(unfold(torch.tensor([1, 0]), inner))  # keeps blocks of 3 together
    plans = uneven(2, 2, 3, 3, seed=1)
    coupling = {
        "permutation": Permutation(torch.tensor([3, 5, 4, 2, 1, 0])),
        "plan": Plan(uneven(6, 6)),
        "nested, hard inside": NestedPlan(uneven(2, 2), best_inside(plans)),
        "nested": NestedPlan(uneven(2, 2), plans),
    }[kind]
    assert type(coupling.onto(back)) is type(coupling)
    assert torch.equal(coupling.onto(back).matrix(), coupling.matrix()[:, back.source])
