from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from weldnet.data import Split
from weldnet.errors import DataError, ModelError, UsageError
from weldnet.evaluation import (
    agreement,
    barrier,
    calibration_error,
    ensemble_metrics,
    evaluate,
    evaluate_together,
    plane,
    predict_logits,
)
from weldnet.models import mlp, resnet20, simple_cnn
from weldnet.training import initialise


@pytest.fixture
def data() -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(30, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 10, (30,), generator=generator)
    return Split(images, labels, tuple("0123456789"), "noise")


def network(seed: int) -> nn.Module:
    return initialise(lambda: simple_cnn(image_size=8, width=0.25), seed)


def test_metrics_are_their_definitions(data):
    model = network(0)
    logits = model(data.images).detach()
    metrics = evaluate(model, data)
    assert metrics.accuracy == (logits.argmax(1) == data.labels).double().mean().item()
    assert metrics.loss == pytest.approx(functional.cross_entropy(logits, data.labels).item(), rel=1e-6)
    assert metrics.samples == 30
    torch.testing.assert_close(predict_logits(model, data), logits)


@pytest.mark.parametrize("batch_size", [1, 7, 512])
def test_the_batch_size_does_not_matter(data, batch_size):
    expected, got = evaluate(network(0), data), evaluate(network(0), data, batch_size=batch_size)
    assert got.accuracy == expected.accuracy
    assert got.loss == pytest.approx(expected.loss, rel=1e-6)


@pytest.mark.parametrize("kind", ["dataset", "loader", "list", "pair"])
def test_datasets_loaders_and_batches_give_the_same(data, kind):
    dataset = TensorDataset(data.images, data.labels)
    loader = DataLoader(dataset, batch_size=7)
    source = {"dataset": dataset, "loader": loader, "list": list(loader), "pair": (data.images, data.labels)}[kind]
    assert evaluate(network(0), source).loss == pytest.approx(evaluate(network(0), data).loss, rel=1e-6)


def test_evaluation_changes_neither_weights_nor_statistics_nor_flags():
    model = resnet20(width=0.25).train()
    model.layer1.eval()
    before = copy.deepcopy(model)
    data = Split(torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.long), ("a",), "noise")
    first, second = evaluate(model, data), evaluate(model, data, batch_size=3)
    assert first.loss == pytest.approx(second.loss, rel=1e-4)
    torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)
    flags = [[module.training for module in m.modules()] for m in (model, before)]
    assert flags[0] == flags[1]


def test_flags_come_back_after_a_failure():
    model = mlp((4, 3, 2)).train()
    with pytest.raises(DataError):
        evaluate(model, [(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))])
    assert model.training


def test_an_ensemble_averages_probabilities(data):
    models = [network(seed) for seed in range(3)]
    mean = torch.stack([model(data.images).softmax(1) for model in models]).mean(0).detach()
    metrics = ensemble_metrics(models, data)
    assert metrics.loss == pytest.approx(functional.nll_loss(mean.log(), data.labels).item(), rel=1e-5)
    assert metrics.accuracy == (mean.argmax(1) == data.labels).double().mean().item()


def test_an_ensemble_of_copies_is_the_network(data):
    single, triple = evaluate(network(0), data), ensemble_metrics([network(0)] * 3, data)
    assert triple.accuracy == single.accuracy
    assert triple.loss == pytest.approx(single.loss, rel=1e-6)


def test_agreement_is_whole_with_itself(data):
    first, second = (predict_logits(network(seed), data) for seed in (0, 1))
    assert agreement(first, first) == 1.0
    assert agreement(first, second) == agreement(second, first) < 1.0


def loss_on(data: Split):
    return lambda model: evaluate(model, data).loss


def test_the_barrier_of_a_network_with_itself_is_zero(data):
    result = barrier(network(0), network(0), evaluate=loss_on(data), points=5)
    assert result.height == pytest.approx(0, abs=1e-9)
    assert result.points == (0.0, 0.25, 0.5, 0.75, 1.0)


def test_the_ends_of_the_line_are_the_networks_and_the_line_is_straight(data):
    a, b = network(0), network(1)
    seen = []

    def watch(model: nn.Module) -> float:
        assert not model.training
        seen.append(copy.deepcopy(model.state_dict()))
        return evaluate(model, data).loss

    before = copy.deepcopy((a.state_dict(), b.state_dict()))
    result = barrier(a, b, evaluate=watch, points=3)
    torch.testing.assert_close((a.state_dict(), b.state_dict()), before, rtol=0, atol=0)
    assert a.training
    torch.testing.assert_close(seen[0], a.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(seen[2], b.state_dict(), rtol=0, atol=0)
    middle = {key: (value + b.state_dict()[key]) / 2 for key, value in a.state_dict().items()}
    torch.testing.assert_close(seen[1], middle)
    assert result.values[0] == evaluate(a, data).loss
    assert result.values[2] == evaluate(b, data).loss


def test_the_height_is_measured_from_the_line_between_the_ends():
    values = iter([1.0, 4.0, 2.0])
    result = barrier(mlp((2, 2)), mlp((2, 2)), evaluate=lambda model: next(values), points=3)
    assert result.excess == pytest.approx((0.0, 2.5, 0.0))
    assert result.height == pytest.approx(2.5)


def test_a_valley_is_no_barrier_and_nan_is_not_hidden():
    valley, broken = iter([1.0, 0.0, 1.0]), iter([1.0, math.nan, 1.0])
    assert barrier(mlp((2, 2)), mlp((2, 2)), evaluate=lambda model: next(valley), points=3).height == 0
    assert math.isnan(barrier(mlp((2, 2)), mlp((2, 2)), evaluate=lambda model: next(broken), points=3).height)


def test_integer_buffers_stay_those_of_the_first_network():
    a, b = resnet20(width=0.1), resnet20(width=0.1)
    b(torch.randn(2, 3, 32, 32))
    counts = []
    barrier(a, b, evaluate=lambda model: counts.append(int(model.bn1.num_batches_tracked)) or 0.0, points=3)
    assert counts == [0, 0, 0]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (mlp((4, 5, 2)), ["layers.0.weight", "(3, 4)", "(5, 4)"]),
        (mlp((4, 3, 2), bias=False), ["layers.0.bias", "missing"]),
    ],
)
def test_networks_of_different_architectures_have_no_line(other, words):
    with pytest.raises(ModelError) as caught:
        barrier(mlp((4, 3, 2)), other, evaluate=lambda model: 0.0)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("points", [-1, 0, 1])
def test_a_line_needs_two_points(points):
    with pytest.raises(UsageError, match="points"):
        barrier(mlp((2, 2)), mlp((2, 2)), evaluate=lambda model: 0.0, points=points)


@pytest.mark.parametrize(
    ("model", "batches", "error", "words"),
    [
        (mlp((4, 2)), [], DataError, ["no samples"]),
        (mlp((4, 2)), [(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))], DataError, ["no samples"]),
        (
            mlp((4, 2)),
            [(torch.zeros(2, 1, 5), torch.zeros(2, dtype=torch.long))],
            DataError,
            ["(1, 5)", "layers.0.weight", "(2, 4)"],
        ),
        (mlp((4, 2)), [(torch.zeros(2, 4), torch.tensor([0, 2]))], DataError, ["label 2", "has 2"]),
        (nn.Conv2d(1, 2, 3), [(torch.zeros(2, 1, 8, 8), torch.zeros(2))], ModelError, ["(2, 2, 6, 6)"]),
    ],
)
def test_data_that_does_not_fit_is_refused_in_one_line(model, batches, error, words):
    with pytest.raises(error) as caught:
        evaluate(model, batches)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_ensembles_and_agreement_refuse_what_cannot_be_compared(data):
    with pytest.raises(UsageError, match="0 networks"):
        ensemble_metrics([], data)
    with pytest.raises(ModelError, match=r"\(30, 10\) and \(30, 12\)"):
        ensemble_metrics([network(0), simple_cnn(12, image_size=8)], data)
    with pytest.raises(DataError, match=r"\(2, 3\) and \(3, 3\)"):
        agreement(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(UsageError, match="batch_size 0"):
        evaluate(network(0), data, batch_size=0)


# -- calibration and agreement -----------------------------------------------------------------------


def test_the_calibration_error_is_the_hand_computed_one():
    # Bins of 1/15: 0.95 and 0.97 share (14/15, 1], 0.55 lies in (8/15, 9/15], 0.62 in (9/15, 10/15].
    confidence = torch.tensor([0.95, 0.97, 0.55, 0.62], dtype=torch.float64)
    right = torch.tensor([1, 0, 1, 1])
    probabilities = torch.stack([confidence, 1 - confidence], 1)
    expected = (abs(1 - (0.95 + 0.97)) + abs(1 - 0.55) + abs(1 - 0.62)) / 4
    assert calibration_error(probabilities, 1 - right) == pytest.approx(expected, abs=1e-12)


def test_bins_are_closed_above():
    # 0.8 and 0.6 are edges of fifths: they lie in different bins; half-open the other way 0.6 would share 0.7's bin.
    confidence = torch.tensor([0.6, 0.7], dtype=torch.float64)
    probabilities = torch.stack([confidence, 1 - confidence], 1)
    labels = torch.tensor([0, 1])
    assert calibration_error(probabilities, labels, bins=5) == pytest.approx((0.4 + 0.7) / 2, abs=1e-12)


def test_confidence_without_errors_and_chance_without_confidence_are_calibrated():
    sure = torch.eye(3)[torch.tensor([0, 1, 2])]
    assert calibration_error(sure, torch.tensor([0, 1, 2])) == 0
    assert calibration_error(sure, torch.tensor([1, 2, 0])) == 1
    tossed = torch.full((4, 2), 0.5)
    assert calibration_error(tossed, torch.tensor([0, 1, 0, 1])) == 0


def test_the_calibration_error_in_metrics_is_that_of_the_softmax(data):
    model = network(0)
    expected = calibration_error(model(data.images).detach().softmax(1), data.labels)
    assert evaluate(model, data).calibration_error == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (3, "labelled data is a value of type int; give"),
        (torch.zeros(4, 1, 8, 8), "labelled data is a value of type Tensor; give"),
        ([torch.zeros(2, 1, 8, 8)], "a batch of labelled data is a Tensor; give"),
        (TensorDataset(torch.zeros(4, 1, 8, 8)), r"a batch of labelled data is \(Tensor\); give"),
        ([(torch.zeros(1, 1, 8, 8), [0])], r"a batch of labelled data is \(Tensor, list\); give"),
    ],
)
def test_data_without_labels_is_named(given, words: str):
    for ask in (evaluate, lambda net, data: barrier(net, net, evaluate=data, points=2)):
        with pytest.raises(DataError, match=rf"^{words} \(inputs, labels\)"):
            ask(network(0), given)


def test_broken_probabilities_are_not_called_calibrated():
    assert math.isnan(calibration_error(torch.tensor([[math.nan, 0.5]]), torch.tensor([0])))
    with pytest.raises(DataError, match=r"\(2, 2\) and \(3,\)"):
        calibration_error(torch.zeros(2, 2), torch.zeros(3))
    with pytest.raises(UsageError, match="bins 0"):
        calibration_error(torch.ones(1, 1), torch.zeros(1), bins=0)


def test_networks_that_are_evaluated_together_see_the_same_samples(data):
    models = [network(0), network(1), network(2)]
    shuffled = DataLoader(TensorDataset(data.images, data.labels), batch_size=7, shuffle=True)
    together = evaluate_together(models, shuffled, members=2)
    logits = [predict_logits(model, data) for model in models]
    assert [m.accuracy for m in together.metrics] == [evaluate(model, data).accuracy for model in models]
    assert together.ensemble.loss == pytest.approx(ensemble_metrics(models[:2], data).loss, rel=1e-6)
    expected = tuple(tuple(agreement(one, other) for other in logits[:2]) for one in logits)
    assert together.agreement == expected
    mean = torch.stack([found.softmax(1) for found in logits[:2]]).mean(0)
    assert together.with_ensemble == tuple(agreement(found, mean) for found in logits)


def test_data_that_can_be_read_only_once_is_read_once(data):
    batches = iter([(data.images, data.labels)])
    assert evaluate_together([network(0), network(0)], batches).agreement == ((1.0, 1.0), (1.0, 1.0))


# -- line and plane ----------------------------------------------------------------------------------


class Bowl(nn.Module):
    """Two parameters and a floating buffer; its loss is a quadratic of the parameters."""

    def __init__(self, x: float, y: float, variance: float = 1.0):
        super().__init__()
        self.place = nn.Parameter(torch.tensor([x, y], dtype=torch.float64))
        self.register_buffer("variance", torch.tensor(variance, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(int(10 * x)))

    def loss(self) -> float:
        return self.place[0].item() ** 2 + 3 * self.place[1].item() ** 2


def test_the_barrier_of_a_bowl_is_that_of_its_parabola():
    # L(t) - line = -4 t (1 - t) between -1 and 1, upside down with the minus sign: height 1, area 4 / 6.
    valley = barrier(Bowl(-1, 0), Bowl(1, 0), evaluate=Bowl.loss, points=201)
    hill = barrier(Bowl(-1, 0), Bowl(1, 0), evaluate=lambda bowl: -bowl.loss(), points=201)
    assert (valley.height, valley.area) == (0, 0)
    assert hill.height == pytest.approx(1)
    assert hill.area == pytest.approx(2 / 3, rel=1e-3)


def test_a_barrier_and_a_plane_print_as_one_line():
    values = iter([0.0, 0.0, 3.0, 1.0, 2.0])
    hill = barrier(Bowl(0, 0), Bowl(1, 0), evaluate=lambda model: next(values), points=5)
    assert (
        str(hill) == "barrier 2.0000, area 0.5000 on 5 points: loss 0.0000 and 2.0000 at the ends, 3.0000 at t = 0.50"
    )
    flat = barrier(Bowl(0, 0), Bowl(1, 0), evaluate=lambda model: 1.0, points=3)
    assert str(flat) == "barrier 0.0000, area 0.0000 on 3 points: loss 1.0000 and 1.0000 at the ends"
    found = str(plane(Bowl(0, 0), Bowl(2, 0), Bowl(0, 1), evaluate=Bowl.loss, points=3, margin=0))
    assert found.startswith("plane of 3 x 3 points: loss 0.0000 to ")
    assert "own 0.0000 at (0.00, 0.00), " in found


def test_the_area_counts_only_what_lies_above_the_line():
    values = iter([0.0, 1.0, 0.0, -5.0, 0.0])
    found = barrier(Bowl(0, 0), Bowl(1, 0), evaluate=lambda model: next(values), points=5)
    assert found.area == pytest.approx(0.25)
    broken = iter([0.0, math.nan, 0.0])
    assert math.isnan(barrier(Bowl(0, 0), Bowl(1, 0), evaluate=lambda model: next(broken), points=3).area)


def test_the_barrier_of_labelled_data_has_loss_accuracy_and_25_points(data):
    a, b = network(0), network(1)
    found = barrier(a, b, evaluate=data)
    assert len(found.points) == 25
    assert found.values[0] == evaluate(a, data).loss
    assert found.scores["accuracy"][-1] == evaluate(b, data).accuracy
    assert found.to_dict()["barrier"] == found.height
    assert found.to_dict()["area"] == found.area
    with pytest.raises(UsageError, match="no 'loss'"):
        barrier(a, b, evaluate=lambda model: {"accuracy": 1.0})


def test_the_plane_of_a_bowl_is_the_bowl():
    nets = Bowl(1, 1), Bowl(4, 1), Bowl(2, 3)
    found = plane(*nets, evaluate=Bowl.loss, points=7, margin=0.5)
    torch.testing.assert_close(torch.tensor(found.corners), torch.tensor([[0.0, 0], [3, 0], [1, 2]]))
    assert (found.x[0], found.x[-1]) == pytest.approx((-1.5, 4.5))
    assert (found.y[0], found.y[-1]) == pytest.approx((-1, 3))
    expected = [[(1 + x) ** 2 + 3 * (1 + y) ** 2 for x in found.x] for y in found.y]
    torch.testing.assert_close(torch.tensor(found.values), torch.tensor(expected))
    assert found.corner_values == pytest.approx([net.loss() for net in nets])


def test_the_axes_of_a_plane_are_orthonormal_also_where_parameters_are_many():
    nets = [mlp((4, 5, 3)).double() for _ in range(3)]
    flat = [torch.cat([p.detach().flatten() for p in net.parameters()]) for net in nets]
    seen = []

    def distance(model: nn.Module) -> float:
        here = torch.cat([p.detach().flatten() for p in model.parameters()])
        seen.append(here)
        return float((here - flat[0]).norm())

    found = plane(*nets, evaluate=distance, points=4)
    expected = [[math.hypot(x, y) for x in found.x] for y in found.y]
    torch.testing.assert_close(torch.tensor(found.values), torch.tensor(expected))
    for here, there in zip(seen[-3:], flat, strict=True):
        torch.testing.assert_close(here, there)


def test_buffers_follow_inside_the_triangle_and_stay_in_range_outside():
    nets = Bowl(0, 0, 1.0), Bowl(1, 0, 2.0), Bowl(0, 1, 4.0)
    found = plane(*nets, evaluate=lambda m: {"loss": 0.0, "variance": float(m.variance), "count": float(m.count)})
    assert found.scores["count"] == ((0.0,) * 15,) * 15
    grid = found.scores["variance"]
    for j, y in enumerate(found.y):
        for i, x in enumerate(found.x):
            exact = 1 + x + 3 * y
            assert grid[j][i] == pytest.approx(min(4.0, max(1.0, exact)))
    assert found.to_dict()["variance"] == [list(row) for row in grid]
    json.dumps(found.to_dict())


def test_a_plane_needs_three_networks_that_are_not_on_a_line():
    with pytest.raises(ModelError, match="one line"):
        plane(Bowl(0, 0), Bowl(1, 1), Bowl(2, 2), evaluate=Bowl.loss)
    with pytest.raises(ModelError, match="one line"):
        plane(Bowl(0, 0), Bowl(0, 0), Bowl(2, 2), evaluate=Bowl.loss)
    with pytest.raises(UsageError, match="points"):
        plane(Bowl(0, 0), Bowl(0, 1), Bowl(2, 2), evaluate=Bowl.loss, points=1)
    with pytest.raises(UsageError, match="margin"):
        plane(Bowl(0, 0), Bowl(0, 1), Bowl(2, 2), evaluate=Bowl.loss, margin=-1)
    with pytest.raises(ModelError, match=r"layers.0.weight.*in c"):
        plane(mlp((4, 2)), mlp((4, 2)), mlp((5, 2)), evaluate=lambda model: 0.0)
