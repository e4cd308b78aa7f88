"""Averaging, BatchNorm statistics, and fuse() from end to end on networks whose right answer is known."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import weldnet
from networks import NETWORKS, Net, enliven
from weldnet import models
from weldnet.alignment import AUTO, Gamf, Identity, WeightMatching
from weldnet.checkpoints import load, read_metadata
from weldnet.errors import (
    CheckpointError,
    DataError,
    FusionError,
    ModelError,
    StructureError,
    UsageError,
)
from weldnet.fusion import Averaged, BatchNormReset, Repaired, Rescale, average, fuse, make_repair, normalise_weights
from weldnet.fusion import _steps as steps_module
from weldnet.structure import capture, random_renumbering, renumber

# -- averaging -------------------------------------------------------------------------------------


def test_the_average_is_weighted():
    states = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}, {"w": torch.tensor([8.0, 1.0])}]
    assert average(states[:2])["w"].tolist() == [2.0, 4.0]
    assert average(states, [0.5, 0.25, 0.25])["w"].tolist() == [3.25, 2.75]
    assert average(states, [0, 1, 0])["w"].tolist() == [3.0, 6.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_are_kept_and_sums_are_wide(dtype):
    parts = [{"w": torch.full((3,), 60000.0 if dtype == torch.float16 else 3e38, dtype=dtype)} for _ in range(3)]
    mean = average(parts)["w"]  # a sum in half precision would overflow
    assert mean.dtype == dtype
    assert torch.equal(mean, parts[0]["w"])


def test_the_first_dtype_decides():
    mean = average([{"w": torch.ones(2, dtype=torch.float16)}, {"w": torch.full((2,), 2.0)}])["w"]
    assert mean.dtype == torch.float16
    assert mean.tolist() == [1.5, 1.5]


def test_complex_tensors_have_an_average():
    mean = average([{"w": torch.tensor([1 + 2j])}, {"w": torch.tensor([3 + 0j])}], [0.25, 0.75])["w"]
    assert mean.dtype == torch.complex64
    assert mean.tolist() == [2.5 + 0.5j]


def test_counters_take_the_largest_and_equal_integers_stay():
    states = [{"n": torch.tensor(n), "index": torch.tensor([4, 2]), "on": torch.tensor([True])} for n in (3, 9, 5)]
    mean = average(states)
    assert mean["n"].item() == 9
    assert mean["n"].dtype == torch.int64
    assert mean["index"].tolist() == [4, 2]
    assert mean["on"].tolist() == [True]


@pytest.mark.parametrize("values", [([1, 2], [1, 3]), ([True, False], [True, True])])
def test_different_integers_have_no_average(values):
    with pytest.raises(FusionError, match=r"index: (int64|bool) tensors of shape \(2,\) differ"):
        average([{"index": torch.tensor(v)} for v in values])


def test_different_switches_have_no_average():
    with pytest.raises(FusionError, match="on: bool"):
        average([{"on": torch.tensor(True)}, {"on": torch.tensor(False)}])


def test_different_keys_shapes_and_kinds_are_named():
    one = {"w": torch.zeros(2)}
    with pytest.raises(FusionError, match="network 1 and network 3 differ in the tensor 'extra'"):
        average([one, one, {**one, "extra": torch.zeros(1)}])
    with pytest.raises(FusionError, match=r"w: shapes \(2,\) and \(3,\)"):
        average([one, {"w": torch.zeros(3)}])
    with pytest.raises(FusionError, match=r"w: dtypes torch.float32 and torch.int64"):
        average([one, {"w": torch.zeros(2, dtype=torch.int64)}])


def test_the_average_shares_no_memory_with_its_inputs_and_changes_none():
    states = [{"w": torch.randn(3), "n": torch.tensor([1, 2])} for _ in range(2)]
    before = copy.deepcopy(states)
    for given in (states, states[:1]):
        mean = average(given)
        for name in mean:
            mean[name].zero_()
        assert all(torch.equal(s[k], b[k]) for s, b in zip(states, before, strict=True) for k in s)


def test_weights_default_to_equal_and_are_normalised():
    assert normalise_weights(None, 4) == [0.25] * 4
    assert normalise_weights((0.25, 0.75), 2) == [0.25, 0.75]
    assert math.fsum(normalise_weights([0.333333, 0.333333, 0.333334], 3)) == pytest.approx(1, abs=1e-15)
    assert normalise_weights([1.0, 0.0], 2) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("weights", "count", "says"),
    [
        ([0.5, 0.5], 3, "2 weights for 3 networks"),
        ([0.5, 0.6], 2, r"sum to 1\.1, not to 1; did you mean 0\.4545,0\.5455"),
        ([0.0, 0.0], 2, "sum to 0, not to 1; did you mean 0.5,0.5"),
        ([1.5, -0.5], 2, r"weight -0\.5 is not a finite number"),
        ([math.nan, 1.0], 2, "weight nan"),
        ([math.inf, 1.0], 2, "weight inf"),
        (None, 0, "no network to average"),
    ],
)
def test_bad_weights_are_refused(weights, count, says):
    with pytest.raises(UsageError, match=says):
        normalise_weights(weights, count)


# -- BatchNorm statistics --------------------------------------------------------------------------


def with_norms() -> nn.Module:
    """Two norms; the first one sees the data itself through one convolution."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, momentum=None), nn.Flatten(), nn.Linear(20, 2),
    )  # fmt: skip


def pictures(count: int = 40) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 2 + 1


def reset(model: nn.Module, data: object, **options: int) -> tuple[nn.Module, str]:
    repaired = BatchNormReset(**options)(Averaged(model), data)
    return repaired.model, repaired.summary


def direct_statistics(model: nn.Module, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        seen = [model[0](b) for b in batches]
    means = torch.stack([s.mean((0, 2, 3)) for s in seen]).mean(0)
    variances = torch.stack([s.transpose(0, 1).flatten(1).var(1) for s in seen]).mean(0)
    return means, variances


@pytest.mark.parametrize(("batch", "sizes"), [(40, [40]), (16, [16, 16, 8]), (13, [13, 13, 14]), (39, [40])])
def test_statistics_are_those_of_the_data_with_a_single_leftover_joined(batch, sizes):
    model = with_norms()
    repaired, note = reset(model, pictures(), batch_size=batch)
    mean, variance = direct_statistics(model, list(pictures().split(sizes)))
    torch.testing.assert_close(repaired[1].running_mean, mean)
    torch.testing.assert_close(repaired[1].running_var, variance)
    assert "40 unlabelled inputs" in note


def test_later_norms_see_what_earlier_ones_then_give():
    model = with_norms()
    repaired, _ = reset(model, pictures())
    with torch.no_grad():
        first = repaired[1].train()
        seen = repaired[4](torch.relu(first(repaired[0](pictures()))))
    torch.testing.assert_close(repaired[5].running_mean, seen.mean((0, 2, 3)))


def test_no_more_samples_than_asked_for():
    model = with_norms()
    repaired, note = reset(model, pictures(), samples=10, batch_size=10)
    torch.testing.assert_close(repaired[1].running_mean, direct_statistics(model, [pictures()[:10]])[0])
    assert "on 10 unlabelled" in note


@pytest.mark.parametrize("training", [True, False])
def test_only_statistics_change(training):
    model = with_norms().train(training)
    model[5].eval()
    model[1].num_batches_tracked.fill_(17)
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    repaired, _ = reset(model, pictures())
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags == [m.training for m in repaired.modules()]
    assert (repaired[1].momentum, repaired[5].momentum) == (0.3, None)
    assert repaired[1].num_batches_tracked.item() == 17
    changed = {k for k, t in repaired.state_dict().items() if not torch.equal(t, before[k])}
    assert changed == {f"{i}.running_{s}" for i in (1, 5) for s in ("mean", "var")}


def test_every_way_to_give_data_gives_the_same():
    model, x = with_norms(), pictures()
    labels = torch.zeros(40, dtype=torch.int64)
    wanted = reset(model, x, batch_size=20)[0][1].running_mean
    for data in (
        TensorDataset(x, labels), TensorDataset(x), DataLoader(TensorDataset(x, labels), batch_size=20),
        [x[:20], x[20:]], [(x[:20], labels[:20]), [x[20:], labels[20:]]], iter([x[:20], x[20:]]), x.double(),
    ):  # fmt: skip
        torch.testing.assert_close(reset(model, data, batch_size=20)[0][1].running_mean, wanted)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "needs unlabelled inputs"),
        (torch.zeros(0, 3, 6, 6), "data is empty"),
        ([], "data is empty"),
        (torch.zeros(1, 3, 6, 6), "only one unlabelled input"),
        (torch.zeros(4, 1, 6, 6), r"shape \(4, 1, 6, 6\) do not fit Sequential"),
        (torch.zeros(4, 7), r"shape \(4, 7\) do not fit Sequential"),
        (["text"], "a batch is a str"),
        ([{"x": torch.zeros(2, 3, 6, 6)}], "a batch is a dict"),
    ],
)
def test_data_that_does_not_fit_is_refused(data, says):
    model = with_norms()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match=says):
        reset(model, data)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_repairs_that_make_no_sense_are_refused():
    with pytest.raises(UsageError, match="Sequential has no BatchNorm statistics"):
        reset(nn.Sequential(nn.Linear(2, 2)), torch.zeros(4, 2))
    untracked = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False))
    with pytest.raises(UsageError, match="no BatchNorm statistics"):
        reset(untracked, torch.zeros(4, 2))
    for options in ({"samples": 1}, {"batch_size": 1}, {"samples": -5}):
        with pytest.raises(UsageError, match="at least 2"):
            BatchNormReset(**options)
    with pytest.raises(UsageError, match="unknown repair 'magic'; weldnet has auto, none, weights"):
        make_repair("magic", with_norms())


# -- fuse: networks whose right answer is known ------------------------------------------------------

REFERENCE: dict[str, tuple[dict[str, object], tuple[int, ...]]] = {
    "mlp": ({"sizes": (20, 12, 9, 5)}, (2, 20)),
    "lenet": ({"width": 0.5}, (2, 1, 28, 28)),
    "simple_cnn": ({"width": 0.25, "image_size": 8}, (2, 1, 8, 8)),
    "vgg11": ({"width": 1 / 16}, (2, 3, 32, 32)),
    "vgg13": ({"width": 1 / 16, "batch_norm": True, "bias": False}, (2, 3, 32, 32)),
    "vgg16": ({"width": 1 / 16, "batch_norm": True}, (2, 3, 32, 32)),
    "resnet18": ({"width": 1 / 16}, (2, 3, 16, 16)),
    "resnet20": ({"width": 0.25}, (2, 3, 16, 16)),
    "resnet50": ({"width": 1 / 16}, (2, 3, 16, 16)),
}
METHODS = [Gamf(), WeightMatching()]
#: Of the networks of every kind, those whose planted permutations are undone too.
WIRINGS = ["residual", "concatenation", "flatten", "depthwise", "grouped", "two_names", "tied_transposed"]
WIRINGS += ["padded_shortcut", "encoder_layer"]


@cache
def reference(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    options, shape = REFERENCE[name]
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return enliven(models.build(name, **options), x, seed), x


def planted(model: nn.Module, x: object, seed: int) -> nn.Module:
    """The same network with its hidden units renumbered."""
    structure = capture(model, x)
    sources = random_renumbering(structure, torch.Generator().manual_seed(seed))
    twin = copy.deepcopy(model)
    twin.load_state_dict(renumber(model.state_dict(), structure, sources))
    return twin


def assert_same_function(one: nn.Module, other: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(one(x), other(x), rtol=1e-10, atol=1e-10)


def test_all_reference_networks_are_here():
    assert set(REFERENCE) == set(models.MODELS)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("name", REFERENCE)
def test_a_planted_permutation_is_undone_exactly(name, method):
    model, x = reference(name)
    result = fuse([model, planted(model, x, 5)], x, method=method, progress=False, check=False)
    state = model.state_dict()
    assert all(torch.equal(t, state[k]) for k, t in result.state_dict().items())
    assert_same_function(result.model, model, x)
    naive = average([state, planted(model, x, 5).state_dict()])
    assert any(not torch.equal(t, state[k]) for k, t in naive.items())
    assert result.alignment.moved["b"] > 0.5


@pytest.mark.parametrize("method", [*METHODS, Identity()], ids=lambda m: m.name)
@pytest.mark.parametrize("name", REFERENCE)
def test_fusing_a_network_with_itself_changes_nothing(name, method):
    model, x = reference(name)
    result = fuse([model, copy.deepcopy(model)], x, method=method, progress=False, check=False)
    state = model.state_dict()
    assert all(torch.equal(t, state[k]) for k, t in result.state_dict().items())
    assert result.alignment.moved == {"a": 0.0, "b": 0.0}


@pytest.mark.parametrize("name", ["mlp", "simple_cnn", "resnet20", "vgg11"])
def test_four_planted_networks_meet_in_the_first(name):
    model, x = reference(name)
    result = fuse([model, *(planted(model, x, s) for s in (1, 2, 3))], x, progress=False)
    assert_same_function(result.model, model, x)
    for key, tensor in result.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[key], rtol=1e-14, atol=1e-14)
    assert all(row.equivalence is not None and row.equivalence <= 1e-9 for row in result.report.rows[:4])


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("name", WIRINGS)
def test_planted_permutations_of_every_wiring_are_undone(name, method):
    model, x = NETWORKS[name].model(), NETWORKS[name].example()
    result = fuse([model, planted(model, x, 3)], x, method=method, progress=False)
    assert_same_function(result.model, model, x)


def different_pair(seed: int = 0) -> tuple[nn.Module, nn.Module, Tensor]:
    (a, x), (b, _) = reference("mlp", seed), reference("mlp", seed + 10)
    return a, b, x


def test_the_fused_network_is_the_average_of_aligned_parents():
    a, b, x = different_pair()
    result = fuse([a, b], x, weights=[0.25, 0.75], progress=False)
    moved = weldnet.transport(b.state_dict(), result.structure, result.alignment["b"])
    for key, tensor in result.state_dict().items():
        torch.testing.assert_close(tensor, 0.25 * a.state_dict()[key] + 0.75 * moved[key])
    assert result.alignment.moved["b"] > 0


def test_unlabelled_inputs_that_are_too_few_to_say_much_are_counted():
    a, b, x = different_pair()
    some = torch.randn(64, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    for count, options in ((3, {}), (3, {"method": "activation_matching", "repair": "none"}), (64, {})):
        notes = fuse([a, b], x, data=some[:count], progress=False, check=False, **options).report.notes
        assert any(note.startswith(f"there are only {count} unlabelled inputs") for note in notes) == (count < 64)
    assert not any(
        "only" in note for note in fuse([a, b], x, data=some[:3], repair="none", progress=False).report.notes
    )


def test_which_floating_type_the_result_has_is_said():
    a, b, x = different_pair()
    half = copy.deepcopy(a).half()
    for pair, types, kind in (
        ({"h": half, "d": b}, "h: float16, d: float64", "float16, as is 'h'"),
        ({"d": b, "h": half}, "d: float64, h: float16", "float64, as is 'd'"),
    ):
        first = next(iter(pair.values()))
        dtype = next(first.parameters()).dtype
        result = fuse(pair, x.to(dtype), method="identity", progress=False)
        assert {tensor.dtype for tensor in result.state_dict().values()} == {dtype}
        said = f"the networks' types differ ({types}); the fused network is {kind}."
        assert said in result.report.notes
    assert not any("types differ" in note for note in fuse([a, b], x, method="identity", progress=False).report.notes)


def test_inputs_are_never_changed_nor_shared():
    a, b, x = (copy.deepcopy(m) for m in different_pair())
    a.train()
    before, given = [copy.deepcopy(m.state_dict()) for m in (a, b)], x.clone()
    torch.manual_seed(3)
    rng = torch.random.get_rng_state()
    result = fuse([a, b], x, progress=False)
    assert torch.equal(torch.random.get_rng_state(), rng)
    with torch.no_grad():
        for parameter in result.model.parameters():
            parameter.fill_(7)
    for module, state in zip((a, b), before, strict=True):
        assert all(torch.equal(t, state[k]) for k, t in module.state_dict().items())
    assert torch.equal(x, given)
    assert (a.training, b.training) == (True, False)


def test_the_same_seed_gives_the_same_bits():
    a, b, x = different_pair()
    for method in METHODS:
        one, two = (fuse([a, b], x, method=method, seed=4, progress=False).state_dict() for _ in range(2))
        assert all(torch.equal(t, two[k]) for k, t in one.items())


def test_weights_go_by_name_or_by_position():
    a, b, x = different_pair()
    by_name = fuse({"left": a, "right": b}, x, weights={"right": 0.25, "left": 0.75}, progress=False)
    by_place = fuse([a, b], x, weights=(0.75, 0.25), progress=False)
    assert all(torch.equal(t, by_place.state_dict()[k]) for k, t in by_name.state_dict().items())
    assert [(r.name, r.weight) for r in by_name.report.rows[:2]] == [("left", 0.75), ("right", 0.25)]
    alone = fuse([a, b], x, weights=[1, 0], progress=False)
    assert all(torch.equal(t, a.state_dict()[k]) for k, t in alone.state_dict().items())


def test_networks_have_names():
    a, b, x = different_pair()
    assert set(fuse({"site1": a, "site2": b}, x, progress=False).alignment.couplings) == {"site1", "site2"}
    assert set(fuse([a, b, a], x, progress=False).alignment.couplings) == {"a", "b", "c"}


# -- fuse: what it reports -------------------------------------------------------------------------


def test_the_report_has_the_parents_the_naive_average_and_the_fused_network():
    a, b, x = different_pair()
    report = fuse([a, b], x, progress=False).report
    assert [(r.name, r.role) for r in report.rows] == [
        ("a", "parent"), ("b", "parent"), ("naive average", "naive"), ("fused", "fused"),
    ]  # fmt: skip
    assert report.row("fused") is report.rows[-1]
    assert report.row("ensemble") is None
    assert report.rows[0].moved == 0.0
    assert report.rows[1].moved > 0
    assert 0 <= report.rows[1].equivalence <= 1e-9
    assert report.rows[2].equivalence is None
    assert report.spaces == 2
    assert report.free_share == 1.0
    assert report.parameters == sum(p.numel() for p in a.parameters())
    assert report.check.startswith("passed: ")
    assert report.method == "gamf"
    assert report.repair == "none"
    assert set(report.seconds) == {"capture", "check", "align", "transport", "average", "repair", "evaluate"}
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["name"] == "a"
    for word in ("parent", "equivalence error", "method     gamf", "2 spaces, 100.0%", "not measured"):
        assert word in str(report)


def test_scores_come_from_a_function_of_the_network():
    a, b, x = different_pair()
    weighed: list[nn.Module] = []

    def judge(model: nn.Module) -> float:
        weighed.append(model)
        return float(next(model.parameters())[0, 0])

    rows = fuse([a, b], x, evaluate_on=judge, progress=False).report.rows
    assert [r.scores["score"] for r in rows] == [float(next(m.parameters())[0, 0]) for m in weighed]
    assert weighed[0] is a
    assert weighed[1] is b
    several = fuse([a, b], x, evaluate_on=lambda m: {"loss": 1.0, "depth": 3.0}, progress=False).report
    assert several.rows[3].scores == {"loss": 1.0, "depth": 3.0}
    assert "depth" in str(several)


def normalised(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(20, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 5)).double()
        net(3 * torch.randn(64, 20, dtype=torch.float64) + 1)
    return net.eval()


@pytest.mark.parametrize("norm", [False, True])
def test_the_naive_row_is_the_plain_average_with_new_statistics_at_most(norm):
    a, b = (normalised(0), normalised(1)) if norm else different_pair()[:2]
    x = torch.randn(40, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    repaired: list[nn.Module] = []

    def mend(averaged: Averaged, data: object) -> Repaired:
        repaired.append(averaged.model)
        return Rescale()(averaged, data)

    def judge(net: nn.Module) -> float:
        return float(net(x).detach().square().sum())

    result = fuse([a, b], x[:2], repair=mend, data=x, evaluate_on=judge, progress=False)
    assert len(repaired) == 1, "the naive average was repaired too"
    plain = fuse([a, b], x[:2], repair="none", data=x, evaluate_on=judge, progress=False)
    mean = copy.deepcopy(a)
    mean.load_state_dict(average([a.state_dict(), b.state_dict()]))
    assert plain.report.row("naive").scores == {"score": judge(mean)}
    wanted = BatchNormReset()(Averaged(mean, example_input=x[:2]), x).model if norm else mean
    assert result.report.row("naive").scores == {"score": judge(wanted)}
    assert (judge(wanted) != judge(mean)) == norm
    (note,) = [note for note in result.report.notes if "the naive average has no repair" in note]
    assert ("BatchNorm" in note) == norm


def test_labelled_data_adds_the_ensemble():
    a, b, x = different_pair()
    data = [(torch.randn(30, 20, dtype=torch.float64), torch.randint(0, 5, (30,)))]
    report = fuse([a, b], x, evaluate_on=data, progress=False).report
    assert [r.role for r in report.rows] == ["parent", "parent", "ensemble", "naive", "fused"]
    assert all(
        set(r.scores) == {"accuracy", "loss", "calibration_error"} and 0 <= r.scores["accuracy"] <= 1
        for r in report.rows
    )
    assert [set(r.agreement) for r in report.rows] == [{"a", "b", "ensemble"}] * 2 + [set()] + [
        {"a", "b", "ensemble"}
    ] * 2
    parents = report.rows[:2]
    assert [parents[0].agreement["a"], parents[1].agreement["b"]] == [1, 1]
    assert parents[0].agreement["b"] == parents[1].agreement["a"] < 1
    assert f"with a {report.rows[-1].agreement['a']:.2%}, b" in str(report)
    assert report.row("ensemble").weight is None


def test_a_naive_average_that_is_better_is_said_so():
    a, b, x = different_pair()
    answers = iter([0.9, 0.8, 0.7, 0.6])
    notes = fuse([a, b], x, evaluate_on=lambda m: {"accuracy": next(answers)}, progress=False).report.notes
    assert "aligning did not help: the naive average is 10.00 percentage points better." in notes
    assert "the fused network is 30.00 percentage points below the best parent." in notes
    answers = iter([0.9, 0.8, 0.7, 0.95])
    assert fuse([a, b], x, evaluate_on=lambda m: {"accuracy": next(answers)}, progress=False).report.notes == ()


def test_operations_without_a_rule_are_noted():
    network = NETWORKS["linalg"]
    result = fuse([network.model(0), network.model(1)], network.example(), progress=False)
    assert "no rule for aten._linalg_solve_ex: what reaches it was left in place." in result.report.notes
    assert "note       no rule for aten._linalg_solve_ex" in str(result.report)


def test_a_network_without_freedom_is_averaged_and_noted():
    network = NETWORKS["positions"]
    a, b = network.model(0), network.model(1)
    result = fuse([a, b], network.example(), progress=False)
    assert any("nothing in this model can be renumbered" in note for note in result.report.notes)
    mean = average([a.state_dict(), b.state_dict()])
    assert all(torch.equal(t, mean[k]) for k, t in result.state_dict().items())


def test_results_are_saved_with_their_provenance(tmp_path):
    a, b, x = different_pair()
    result = fuse({"left": a, "right": b}, x, weights=[0.25, 0.75], seed=6, progress=False)
    result.save(tmp_path / "fused.safetensors")
    again = load(tmp_path / "fused.safetensors")
    assert set(again) == set(result.state_dict())
    assert all(torch.equal(t, again[k]) for k, t in result.state_dict().items())
    metadata = read_metadata(tmp_path / "fused.safetensors")
    parents = json.loads(metadata["parents"])
    assert [p["name"] for p in parents] == ["left", "right"]
    assert [p["tensors_sha256"] for p in parents] == [result.parents["left"], result.parents["right"]]
    assert len({p["tensors_sha256"] for p in parents}) == 2
    text = json.dumps(metadata)
    assert "Gamf(" in text
    assert "0.75" in text
    assert [p.name for p in tmp_path.iterdir()] == ["fused.safetensors"]


def test_fingerprints_tell_parents_apart_and_nothing_else():
    a, b, x = different_pair()
    one, two = fuse([a, b], x, progress=False), fuse([a, copy.deepcopy(a)], x, progress=False)
    assert one.parents["a"] == two.parents["a"] == two.parents["b"]
    assert one.parents["b"] != one.parents["a"]
    nearly = copy.deepcopy(a)
    next(nearly.parameters()).data[0, 0] += 1e-12
    assert fuse([a, nearly], x, progress=False).parents["b"] != one.parents["a"]


# -- fuse: repair, precision, refusals ---------------------------------------------------------------


def test_statistics_are_reset_when_there_is_data():
    torch.manual_seed(1)
    a, b = with_norms(), with_norms()
    for parameter in b.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    plain = fuse([a, b], pictures(2), repair="none", progress=False)
    repaired = fuse([a, b], pictures(2), data=pictures(), repair="data", progress=False)
    assert plain.report.repair == "none: BatchNorm statistics are the parents' average"
    assert repaired.report.repair == "data: BatchNorm statistics re-estimated on 40 unlabelled inputs"
    mean, variance = direct_statistics(plain.model, [pictures()])
    torch.testing.assert_close(repaired.model[1].running_mean, mean)
    torch.testing.assert_close(repaired.model[1].running_var, variance)
    assert not torch.allclose(plain.model[1].running_mean, mean)
    assert fuse([a, b], pictures(2), data=pictures(), repair="none", progress=False).report.repair.startswith("none")


def test_counters_of_parents_take_the_largest():
    a, b = with_norms(), with_norms()
    b[1].num_batches_tracked.fill_(12)
    assert fuse([a, b], pictures(2), progress=False).model[1].num_batches_tracked.item() == 12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_parents_give_a_half_precision_network(dtype):
    model, x = reference("simple_cnn")
    half = copy.deepcopy(model).to(dtype)
    result = fuse([half, planted(half, x.to(dtype), 4)], x.to(dtype), progress=False)
    assert {t.dtype for t in result.state_dict().values()} == {dtype}
    assert all(torch.equal(t, half.state_dict()[k]) for k, t in result.state_dict().items())
    assert result.report.rows[1].equivalence <= 1e-9


def test_a_device_can_be_named():
    a, b, x = different_pair()
    one, two = fuse([a, b], x, device="cpu", progress=False), fuse([a, b], x, progress=False)
    assert all(torch.equal(t, two.state_dict()[k]) for k, t in one.state_dict().items())


def test_without_the_check_nothing_is_claimed(monkeypatch):
    a, b, x = different_pair()
    monkeypatch.setattr(steps_module, "run_check", lambda *_, **__: pytest.fail("the check was made"))
    report = fuse([a, b], x, check=False, progress=False).report
    assert report.check == "not made (check=False)"
    assert [r.equivalence for r in report.rows] == [None] * 4


def unsound(build: Callable[..., weldnet.Structure]) -> Callable[..., weldnet.Structure]:
    def wrong(model: nn.Module, x: Tensor, *rest: object, **options: object) -> weldnet.Structure:
        structure = build(model, x, *rest, **options)
        return replace(structure, places=tuple(p for p in structure.places if p.tensor != "layers.0.bias"))

    return wrong


def test_a_wrong_structure_stops_before_the_average(monkeypatch):
    a, b, x = different_pair()
    monkeypatch.setattr(steps_module, "capture", unsound(capture))
    monkeypatch.setattr(steps_module, "average", lambda *_: pytest.fail("something was averaged"))
    with pytest.raises(StructureError, match=r"'layers\.0'.*'layers\.0\.bias'"):
        fuse([a, b], x, progress=False)


def test_a_transport_that_changes_a_parent_stops_before_the_average(monkeypatch):
    """Even if the check saw nothing, the alignment itself is proven."""
    a, b, x = different_pair()
    good = weldnet.check(a, x, capture(a, x))
    monkeypatch.setattr(steps_module, "capture", unsound(capture))
    monkeypatch.setattr(steps_module, "run_check", lambda *_, **__: good)
    monkeypatch.setattr(steps_module, "average", lambda *_: pytest.fail("something was averaged"))
    with pytest.raises(StructureError, match=r"its transport changed the output.*nothing was averaged"):
        fuse([a, b], x, progress=False)


def test_every_parent_is_checked():
    """Dead units hide a wrong structure in the first parent; the second one shows it."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.head(torch.relu(m.a(x))) if float(m.switch) > 0 else m.head(torch.relu(m.a(x)).cumsum(1))

    a, b = (
        enliven(
            Net(forward, a=nn.Linear(5, 6), head=nn.Linear(6, 3), switch=torch.tensor(s)), torch.zeros(2, 5).double(), s
        )
        for s in (1, 0)
    )
    with pytest.raises(StructureError, match="space 'a'"):
        fuse([a, b], torch.randn(4, 5, dtype=torch.float64), progress=False)


def refusals():
    a, b, x = different_pair()
    other = reference("simple_cnn")[0]
    nan = copy.deepcopy(b)
    next(nan.parameters()).data[0, 0] = math.nan
    return {
        "size below 1": (lambda: fuse([a, b], x, size=0.5), UsageError, r"size is 0\.5; .*from 1 .* to 2"),
        "size above the parents": (lambda: fuse([a, b], x, size=2.5), UsageError, r"size is 2\.5; .*from 1 .* to 2"),
        "size that is no number": (lambda: fuse([a, b], x, size="big"), UsageError, "size is 'big'"),
        "size that is not a number": (lambda: fuse([a, b], x, size=math.nan), UsageError, "size is nan"),
        "size that is a switch": (lambda: fuse([a, b], x, size=True), UsageError, "size is True"),
        "one network": (lambda: fuse([a], x), UsageError, "two networks or more; got 1"),
        "no network": (lambda: fuse([], x), UsageError, "two networks or more; got 0"),
        "method": (lambda: fuse([a, b], x, method="magic"), UsageError, "magic"),
        "option": (lambda: fuse([a, b], x, method="gamf", colour=3), UsageError, "colour"),
        "options of an object": (lambda: fuse([a, b], x, method=Gamf(), sigma=3.0), UsageError, "sigma"),
        "weights": (lambda: fuse([a, b], x, weights=[0.5, 0.6]), UsageError, r"sum to 1\.1"),
        "weight names": (lambda: fuse([a, b], x, weights={"a": 0.5, "z": 0.5}), UsageError, "differ in 'b'"),
        "repair": (lambda: fuse([a, b], x, repair="magic"), UsageError, "unknown repair 'magic'"),
        "repair without data": (lambda: fuse([a, b], x, repair="data"), DataError, "needs unlabelled inputs"),
        "architectures": (lambda: fuse([a, other], x), CheckpointError, "layers.0"),
        "nan": (lambda: fuse([a, nan], x), CheckpointError, "layers.0.weight"),
        "input": (lambda: fuse([a, b], torch.zeros(2, 7).double()), ModelError, r"float64\[2, 7\]"),
        "device": (lambda: fuse([a, b], x, device="abacus"), UsageError, "abacus"),
    }


@pytest.mark.parametrize("name", list(refusals()))
def test_what_makes_no_sense_is_refused_on_one_line(name):
    call, error, says = refusals()[name]
    with pytest.raises(error, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [None, torch.zeros(4, 20, dtype=torch.float64)], ids=["free", "data"])
def test_auto_is_what_the_table_says_and_the_report_names_it(data):
    a, b, x = different_pair()
    choice = AUTO["without data" if data is None else "with data"]
    result = fuse([a, b], x, method="auto", data=data, progress=False)
    expected = fuse([a, b], x, method=choice.method, data=data, progress=False, **choice.options)
    torch.testing.assert_close(result.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert result.report.method == f"{expected.report.method} (auto: {choice.reason})"
    assert result.report.method.startswith(choice.method)
    assert result.config["method"] == expected.config["method"]


def test_every_choice_of_auto_exists_and_can_do_without_data_where_there_is_none():
    assert {choice.method for choice in AUTO.values()} <= set(weldnet.METHODS)
    made = {when: weldnet.METHODS[choice.method](**choice.options) for when, choice in AUTO.items()}
    assert not made["without data"].needs_data
    other = made["other widths"]
    assert other.any_width
    assert not other.needs_data
