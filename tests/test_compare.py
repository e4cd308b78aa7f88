"""All combinations of methods and repairs on the same networks."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import weldnet
from weldnet.alignment import Alignment, Gamf, Identity
from weldnet.errors import AlignmentError, UsageError
from weldnet.fusion import BatchNormReset, Combination, Comparison, Repaired, compare
from weldnet.fusion import _compare as compare_file
from weldnet.fusion import _steps as steps_file
from weldnet.fusion._memory import watch_memory
from weldnet.training import initialise

X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
DATA = (X, torch.arange(60) % 3)


def network(seed: int, *, norm: bool = False) -> nn.Module:
    between = [nn.BatchNorm1d(12)] if norm else []
    return initialise(lambda: nn.Sequential(nn.Linear(5, 12), *between, nn.ReLU(), nn.Linear(12, 3)), seed)


def pair(**options: bool) -> list[nn.Module]:
    return [network(seed, **options) for seed in (0, 1)]


@dataclass(frozen=True)
class Failing:
    """A method that fails, with an error of weldnet's or of its own."""

    own: bool = True
    name = "failing"
    order_invariant = equivariant = any_width = True
    needs_data = False

    def __call__(self, problem) -> Alignment:
        raise AlignmentError("no luck") if self.own else ZeroDivisionError("1 / 0")


@dataclass(frozen=True)
class Greedy:
    """A repair that reads so many inputs and allocates memory."""

    reads: int = 7

    def __call__(self, averaged, data) -> Repaired:
        for index in range(self.reads):
            data[index % len(data)]
        return Repaired(averaged.model, "greedy")


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])
def test_every_row_is_the_fusion_of_its_method_and_repair(norm):
    nets = pair(norm=norm)
    repairs = ["none", "auto"]
    found = compare(
        nets, X[:2], methods=["identity", "gamf"], repairs=repairs, evaluate_on=DATA, data=X, progress=False
    )
    assert [(row.method, row.repair) for row in found.rows] == [(m, r) for m in ("identity", "gamf") for r in repairs]
    for row in found.rows:
        single = weldnet.fuse(
            nets, X[:2], method=row.method, repair=row.repair, data=X, evaluate_on=DATA, progress=False
        )
        assert row.scores == single.report.row("fused").scores
        assert row.done == single.report.repair
        assert row.error is None
        assert row.seconds > 0
    roles = [(reference.name, reference.role) for reference in found.references]
    assert roles == [("a", "parent"), ("b", "parent"), ("", "ensemble")]
    assert found.references[2].scores == single.report.row("ensemble").scores


def test_structure_is_captured_once_and_each_method_aligns_once(monkeypatch):
    calls = []

    def count(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: calls.append(name) or real(*a, **k))

    count(steps_file, "capture")
    count(compare_file, "align_parents")
    compare(pair(), X[:2], methods=["identity", "gamf"], repairs=["none", "auto"], evaluate_on=DATA, progress=False)
    assert calls == ["capture", "align_parents", "align_parents"]


def test_what_fails_is_a_row_with_its_reason_and_the_rest_goes_on():
    methods = [Failing(), Failing(own=False), "identity"]
    found = compare(pair(), X[:2], methods=methods, repairs=["none", "data"], evaluate_on=DATA, progress=False)
    errors = [row.error for row in found.rows]
    assert errors[:4] == ["no luck", "no luck", "ZeroDivisionError: 1 / 0", "ZeroDivisionError: 1 / 0"]
    assert errors[4] is None
    assert "needs unlabelled inputs" in errors[5]
    assert found.worked == (found.rows[4],)
    assert found.best() == found.rows[4]
    assert "failed     failing own=False with none: ZeroDivisionError: 1 / 0" in str(found)


def test_options_of_methods_and_repairs_are_named():
    methods = [Gamf(sigma=4.0), Gamf(), "auto"]
    repairs = [BatchNormReset(samples=20)]
    nets = pair(norm=True)
    found = compare(nets, X[:2], methods=methods, repairs=repairs, evaluate_on=DATA, data=X, progress=False)
    assert [row.method for row in found.rows] == ["gamf sigma=4.0", "gamf", "auto: gamf activations=1.0"]
    assert {row.repair for row in found.rows} == {"BatchNormReset(samples=20, batch_size=128)"}
    # 20 inputs were needed; a batch holds 128, of which all were read.
    assert [row.samples for row in found.rows] == [60, 60, 60]


def test_samples_are_the_different_inputs_that_were_read():
    repairs = [Greedy(7), Greedy(100), "none"]
    found = compare(pair(), X[:2], methods=["identity"], repairs=repairs, data=X, samples=30, progress=False)
    assert [row.samples for row in found.rows] == [7, 30, 0]
    assert "of 30 that were given" in str(found)


def test_the_barrier_is_that_of_the_aligned_networks_and_the_same_for_every_repair():
    nets = [network(seed) for seed in range(3)]
    found = compare(nets, X[:2], methods=["gamf"], repairs=["none", "auto"], evaluate_on=DATA, points=5, progress=False)
    structure = weldnet.capture(nets[0], X[:2])
    alignment = weldnet.align(nets, structure, method="gamf")
    heights = []
    for name, net in zip("bc", nets[1:], strict=True):
        moved = network(0)
        moved.load_state_dict(weldnet.transport(net.state_dict(), structure, alignment[name]))
        heights.append(weldnet.barrier(nets[0], moved, evaluate=DATA, points=5).height)
    assert [row.barrier for row in found.rows] == [pytest.approx(max(heights))] * 2
    without = compare(nets, X[:2], methods=["gamf"], evaluate_on=DATA, points=0, progress=False)
    assert without.rows[0].barrier is None


def test_a_function_scores_too_and_makes_a_barrier_only_with_a_loss():
    def size(model: nn.Module) -> float:
        return float(model[0].weight.detach().square().sum())

    plain = compare(pair(), X[:2], methods=["identity"], evaluate_on=size, progress=False)
    assert plain.rows[0].barrier is None
    assert set(plain.rows[0].scores) == {"score"}
    losses = compare(pair(), X[:2], methods=["identity"], evaluate_on=lambda m: {"loss": -size(m)}, progress=False)
    assert losses.rows[0].barrier > 0


def test_rows_are_sorted_best_first_and_failures_last():
    rows = [
        Combination(method="b", repair="none", scores={"accuracy": 0.5, "loss": 1.0}, seconds=1.0, samples=0),
        Combination(method="c", repair="none", error="broken"),
        Combination(method="a", repair="none", scores={"accuracy": 0.9, "loss": 2.0}, seconds=3.0, samples=5),
        Combination(method="d", repair="none", scores={"accuracy": 0.7, "loss": float("nan")}, seconds=2.0),
    ]
    found = Comparison(rows=tuple(rows))
    orders = {by: "".join(row.method for row in found.sorted(by)) for by in (None, "loss", "seconds", "method")}
    assert orders == {None: "adbc", "loss": "badc", "seconds": "bdac", "method": "abdc"}
    assert found.best().method == "a"
    assert found.best("loss").method == "b"
    assert found.to_csv("loss").splitlines()[0].startswith("method,repair,accuracy,loss,barrier")
    assert [line.split(",")[0] for line in found.to_csv("loss").splitlines()[1:]] == ["b", "a", "d", "c"]
    json.dumps(found.to_dict())
    with pytest.raises(UsageError, match="no column 'size'"):
        found.sorted("size")
    with pytest.raises(UsageError, match="no combination worked"):
        Comparison(rows=(rows[1],)).best()


def test_memory_is_the_growth_of_the_resident_memory():
    with watch_memory() as idle:
        pass
    if idle.bytes is None:
        pytest.skip("this system does not say what is resident")
    with watch_memory() as busy:
        held = torch.ones(64 * 2**20 // 4)
    assert held.numel()
    assert 60 * 2**20 < busy.bytes < 90 * 2**20
    assert idle.bytes < 8 * 2**20


def test_nothing_that_is_given_changes():
    nets = pair(norm=True)
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in nets]
    compare(nets, X[:2], methods=[Identity(), "gamf"], evaluate_on=DATA, data=X, progress=False)
    for net, state in zip(nets, before, strict=True):
        torch.testing.assert_close(dict(net.state_dict()), state, rtol=0, atol=0)
        assert net.training


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": []}, "at least one"),
        ({"methods": "gamf"}, "a list"),
        ({"repairs": ()}, "at least one"),
        ({"points": 1}, "points 1"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        compare(pair(), X[:2], progress=False, **options)
