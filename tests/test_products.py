"""Scores by plain products over bricks equal those of unfolded rows, however couplings change between visits."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref

import pytest
import torch
from torch import nn

import weldnet
from weldnet import models
from weldnet.affinity import InnerProduct
from weldnet.alignment import Problem
from weldnet.alignment._ascent import Ascent, start
from weldnet.alignment._sweeps import Assignments, hard_sweeps, strangers
from weldnet.assignment import Table, solve_table
from weldnet.errors import AlignmentError
from weldnet.structure import Space, bricks_of


class Joined(nn.Module):
    """Two branches that are concatenated and flattened: several spaces on one axis, several copies of a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1)
        self.mix = nn.Conv2d(9, 6, 3, padding=1)
        self.out = nn.Linear(6 * 16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([self.a(x).relu(), self.b(x).relu()], 1)
        return self.out(self.mix(joined).relu().flatten(1))


CASES = {
    "vgg11": (lambda: models.build("vgg11", width=0.0625), (1, 3, 32, 32)),
    "resnet20": (lambda: models.build("resnet20", width=0.25), (1, 3, 32, 32)),
    "joined": (Joined, (1, 3, 4, 4)),
}


def ascent_of(case: str, count: int) -> Ascent:
    torch.manual_seed(0)
    make, shape = CASES[case]
    networks = [make() for _ in range(count)]
    structure = weldnet.capture(networks[0], torch.zeros(shape))
    return start(Problem(structure, {str(i): n.state_dict() for i, n in enumerate(networks)}), "root")


def couple(ascent: Ascent, space: str, k: int, generator: torch.Generator, *, soft: bool) -> torch.Tensor:
    size = ascent.structure.space(space).size
    coupling = torch.randperm(size, generator=generator)
    if soft:
        coupling = torch.softmax(torch.randn(size, size, generator=generator), dim=0)
    ascent.put(space, k, whole=coupling)
    return coupling


def unfolded(ascent: Ascent, space: str, k: int) -> torch.Tensor:
    """The scores from rows, without bricks and without memory of earlier visits."""
    total = torch.tensor(0.0)
    couplings = list(ascent.couplings[space].clone())
    for place in ascent.structure.places_of(space):
        pool = ascent._place_pool(place, InnerProduct(), couplings)
        total = total + ascent.weights[place.tensor] * pool.scores(k)
    return total


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_visits_up_and_down_score_as_unfolded_rows_do(case, count, soft):
    ascent, generator = ascent_of(case, count), torch.Generator().manual_seed(1)
    if soft:
        ascent.soften()
    roots = ascent.structure.roots
    for space in (*roots, *roots[::-1], *roots):
        pool = ascent.pool(space, InnerProduct())
        for k in ascent.moving:
            torch.testing.assert_close(pool.scores(k), unfolded(ascent, space.name, k), rtol=1e-4, atol=1e-5)
            if space.size % 2 == 0 or k == 1:  # some stay as they are
                pool.replace(k, couple(ascent, space.name, k, generator, soft=soft), last=k == ascent.moving[-1])


def test_a_coupling_written_past_the_ascent_is_noticed():
    ascent, generator = ascent_of("vgg11", 3), torch.Generator().manual_seed(2)
    first, second = ascent.structure.roots[:2]
    ascent.pool(first, InnerProduct()).scores(1)
    ascent.couplings[second.name][0] = torch.randperm(second.size, generator=generator)
    got = ascent.pool(first, InnerProduct()).scores(1)
    torch.testing.assert_close(got, unfolded(ascent, first.name, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_bricks_hold_every_position_of_a_space_once(case):
    structure = ascent_of(case, 2).structure
    for tensor in {place.tensor for place in structure.places}:
        numbers = torch.arange(1, 1 + torch.Size(structure.shapes[tensor]).numel()).reshape(structure.shapes[tensor])
        bricks = bricks_of(structure, tensor)
        assert bricks is not None
        held = torch.cat([brick.cut(numbers).flatten() for brick in bricks])
        assert len(held) == len(held.unique())
        for place in structure.places_in(tensor):
            index = torch.as_tensor(structure.positions(place).reshape(-1))
            assert torch.isin(numbers.index_select(place.axes[0], index), held).all()


def test_a_settled_space_is_visited_again_only_once_something_near_it_moves():
    ascent, generator = ascent_of("vgg11", 3), torch.Generator().manual_seed(3)
    first, second, *_, far = ascent.structure.roots
    ascent.settle(first, "rule")
    couple(ascent, far.name, 1, generator, soft=False)
    ascent.put(second.name, 1, whole=ascent.couplings[second.name][0].clone())  # the same again
    assert ascent.is_settled(first, "rule")
    assert not ascent.is_settled(first, "other rule")
    couple(ascent, second.name, 1, generator, soft=False)
    assert not ascent.is_settled(first, "rule")


def moved_by_sweep(settled: float) -> tuple[list[int], bool]:
    """How many units each hard sweep moves, and whether the sweeps say that they settled."""
    ascent = ascent_of("vgg11", 6)
    seen: list[dict[str, torch.Tensor]] = []

    def orders():
        while True:
            seen.append({name: value.clone() for name, value in ascent.couplings.items()})
            yield ascent.structure.roots

    count, converged = hard_sweeps(ascent, InnerProduct(), orders(), settled=settled)
    seen.append(dict(ascent.couplings))
    assert len(seen) == count + 1
    pairs = itertools.pairwise(seen)
    return [sum(int((new[n] != old[n]).sum()) for n in old) for old, new in pairs], converged


def test_hard_sweeps_end_once_no_more_than_the_settled_share_moves():
    whole, converged = moved_by_sweep(0.0)
    units = 5 * sum(space.size for space in ascent_of("vgg11", 6).structure.spaces)
    assert converged
    assert whole[-1] == 0 < min(whole[:-1])
    first = next(i for i, moved in enumerate(whole) if moved <= 0.02 * units)
    assert 0 < first < len(whole) - 1
    short, converged = moved_by_sweep(0.02)
    assert converged
    assert short == whole[: first + 1]


@pytest.mark.parametrize("count", [2, 3])
def test_weights_go_with_the_ascent_that_held_them(count):
    ascent = ascent_of("vgg11", count)
    for space in ascent.structure.roots:
        ascent.pool(space, InnerProduct()).scores(1)
    gone = weakref.ref(ascent)
    gc.disable()
    try:
        del ascent
        assert gone() is None
    finally:
        gc.enable()


# -- spaces that do not touch one another ----------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_runs_of_strangers_are_the_order_cut_where_two_share_a_tensor(case):
    ascent = ascent_of(case, 2)
    order = ascent.structure.roots
    runs = list(strangers(ascent, order))
    assert [space for run in runs for space in run] == list(order)
    tensors = {s.name: {p.tensor for p in ascent.structure.places_of(s.name)} for s in order}
    for run in runs:
        for one, other in itertools.combinations(run, 2):
            assert not tensors[one.name] & tensors[other.name]
    for run, after in itertools.pairwise(runs):
        assert any(tensors[space.name] & tensors[after[0].name] for space in run)
    assert max(map(len, runs)) > 1 or case != "resnet20"


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_assignments_in_other_threads_change_nothing(case, count, monkeypatch):
    ends: list[dict[str, torch.Tensor]] = []
    for threads in (1, 4):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        ascent = ascent_of(case, count)
        hard_sweeps(ascent, InnerProduct(), itertools.repeat(ascent.structure.roots, 30))
        ends.append(dict(ascent.couplings))
    for name, coupling in ends[0].items():
        assert torch.equal(ends[1][name], coupling)


def test_assignments_run_beside_one_another_and_come_back_in_order():
    spaces = [Space(f"s{n}", 2) for n in range(6)]
    drawn: list[str] = []
    meeting = threading.Barrier(3, timeout=30)

    def tables():
        for number, space in enumerate(spaces):
            drawn.append(space.name)
            yield space, torch.eye(2)[[number % 2, 1 - number % 2]]

    def solve(table: Table) -> torch.Tensor:
        meeting.wait()  # passes only if three are solved at once
        return solve_table(table)

    with pytest.MonkeyPatch.context() as patch, Assignments(3) as assignments:
        patch.setattr("weldnet.alignment._sweeps.solve_table", solve)
        found = assignments.solve(tables())
        first = next(found)
        assert drawn == ["s0", "s1", "s2", "s3"]  # one more than are solved, no further
        results = [first, *found]
    assert [space.name for space, _, _ in results] == [space.name for space in spaces]
    assert [source.tolist() for _, _, source in results] == [[0, 1], [1, 0]] * 3


def test_only_a_few_assignments_run_at_once(monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    assert Assignments.of(ascent_of("vgg11", 2)).count == 4
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    assert Assignments.of(ascent_of("vgg11", 2)).count == 1


def test_scores_without_an_assignment_say_why():
    with Assignments(2) as assignments, pytest.raises(AlignmentError, match="NaN"):
        list(assignments.solve([(Space("s", 2), torch.full((2, 2), torch.nan))]))
