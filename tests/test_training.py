from __future__ import annotations

import copy
import math
import os
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from weldnet import models
from weldnet.data import Split, load
from weldnet.errors import DataError, ModelError, TrainingError, UsageError
from weldnet.training import Recipe, TrainingResult, distil, fine_tune, initialise, train
from weldnet.training._recipe import crop_flip, lr_factor

RECIPE = Recipe(epochs=3, batch_size=32, schedule="onecycle", augment="crop-flip", lr=3e-3, seed=5)


class InterruptedRunError(Exception):
    pass


class Busy(nn.Module):
    """Has a convolution, batch norm and dropout: everything that carries state or draws random numbers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(4 * 64, 10)

    def forward(self, x):
        return self.fc(self.drop(self.norm(self.conv(x)).relu()).flatten(1))


@pytest.fixture(scope="module")
def digits() -> Split:
    pytest.importorskip("sklearn")
    return load("digits", split="train", limit=200)


@pytest.fixture
def model() -> nn.Module:
    return initialise(Busy, 1)


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        replace(RECIPE, optimizer="sgd", lr=0.05, weight_decay=1e-3, schedule="cosine", label_smoothing=0.1),
        replace(RECIPE, precision="bfloat16", schedule="constant", augment="none"),
    ],
    ids=["adam", "sgd", "bfloat16"],
)
def test_a_resumed_run_gives_the_weights_of_an_unbroken_one(model, digits, recipe, tmp_path, monkeypatch):
    whole = train(model, digits, recipe, progress=False)
    path = tmp_path / "deep" / "run.state"
    replaced = os.replace

    def stop_after_two(source, target):
        replaced(source, target)
        stop_after_two.left -= 1
        if not stop_after_two.left:
            raise InterruptedRunError

    stop_after_two.left = 2
    monkeypatch.setattr(os, "replace", stop_after_two)
    with pytest.raises(InterruptedRunError):
        train(model, digits, recipe, state_path=path, progress=False)
    monkeypatch.undo()
    torch.rand(3)
    resumed = train(model, digits, recipe, state_path=path, resume=True, progress=False)
    assert same(whole.model, resumed.model)
    losses = [[epoch.loss for epoch in result.history] for result in (whole, resumed)]
    assert losses[0] == losses[1]
    again = train(model, digits, recipe, state_path=path, resume=True, progress=False)
    assert same(whole.model, again.model)


def test_the_same_seed_gives_bit_equal_weights_and_another_seed_others(model, digits):
    first, second, other = (train(model, digits, replace(RECIPE, seed=s), progress=False) for s in (5, 5, 6))
    assert same(first.model, second.model)
    assert not same(first.model, other.model)


def test_training_changes_neither_the_model_nor_the_global_generator(model, digits):
    model.eval()
    model.conv.train()
    before, images, state = copy.deepcopy(model), digits.images.clone(), torch.get_rng_state()
    result = train(model, digits, RECIPE, progress=False)
    assert same(model, before)
    assert torch.equal(digits.images, images)
    assert torch.equal(torch.get_rng_state(), state)
    flags = [[module.training for module in m.modules()] for m in (model, result.model)]
    assert flags[0] == flags[1]
    assert all(parameter.is_contiguous() for parameter in result.model.parameters())


def test_a_network_learns_the_digits(digits):
    network = initialise(lambda: models.simple_cnn(image_size=8), 0)
    result = train(
        network,
        digits,
        Recipe(epochs=20, batch_size=16, lr=3e-3, schedule="onecycle"),
        validation=load("digits"),
        progress=False,
    )
    assert result.history[-1].loss < result.history[0].loss / 4
    assert result.history[-1].validation > 0.85
    assert len(result.history) == 20
    assert result.seconds > 0


def test_no_epochs_give_the_network_back(model, digits):
    result = train(model, digits, replace(RECIPE, epochs=0), progress=False)
    assert same(result.model, model)
    assert result.history == ()


def test_data_smaller_than_a_batch_is_one_batch(model, digits):
    result = train(model, digits, replace(RECIPE, epochs=1, batch_size=1000), progress=False)
    assert not same(result.model, model)


def test_a_loss_that_is_not_finite_stops_the_run(model, digits):
    poisoned = replace(digits, images=digits.images.clone())
    poisoned.images[3] = math.nan
    with pytest.raises(TrainingError, match=r"nan in epoch 1, step \d+.*0\.003"):
        train(model, poisoned, RECIPE, progress=False)


@pytest.mark.parametrize(
    ("shape", "labels", "words"),
    [((4, 3, 8, 8), 10, ["(3, 8, 8)", "conv.weight", "(4, 1, 3, 3)"]), ((4, 1, 8, 8), 11, ["10", "(1, 10)"])],
)
def test_data_that_does_not_fit_the_model_is_refused_before_the_first_step(model, shape, labels, words):
    data = Split(torch.zeros(shape), torch.full((4,), labels - 1), tuple("abcdefghijkl"), "made up")
    with pytest.raises(DataError) as caught:
        train(model, data, RECIPE, progress=False)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_a_state_of_another_run_is_refused(model, digits, tmp_path):
    path = tmp_path / "run.state"
    train(model, digits, RECIPE, state_path=path, progress=False)
    with pytest.raises(TrainingError, match=r"lr is 0\.003 there and 0\.1 here"):
        train(model, digits, replace(RECIPE, lr=0.1), state_path=path, resume=True, progress=False)
    network = models.simple_cnn(image_size=8)
    with pytest.raises(TrainingError, match="another model"):
        train(network, digits, RECIPE, state_path=path, resume=True, progress=False)
    path.write_bytes(b"broken")
    with pytest.raises(TrainingError, match="not a saved training state"):
        train(model, digits, RECIPE, state_path=path, resume=True, progress=False)
    train(model, digits, RECIPE, state_path=path, progress=False)
    train(model, digits, RECIPE, state_path=path, resume=True, progress=False)


def test_a_state_that_cannot_be_written_is_reported(model, digits, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="cannot be written"):
        train(model, digits, RECIPE, state_path=tmp_path / "file" / "run.state", progress=False)


def test_resuming_needs_a_place(model, digits):
    with pytest.raises(UsageError, match="state_path"):
        train(model, digits, RECIPE, resume=True)


def test_crops_are_windows_of_the_padded_image_and_half_are_mirrored():
    images = torch.arange(1.0, 65).view(1, 1, 8, 8).repeat(64, 2, 1, 1)
    out = crop_flip(images, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(images[:1], (4,) * 4)
    windows = {padded[0, 0, y : y + 8, x : x + 8].numpy().tobytes(): (y, x) for y in range(9) for x in range(9)}
    plain = [image[0].numpy().tobytes() in windows for image in out]
    mirrored = [image[0].flip(1).contiguous().numpy().tobytes() in windows for image in out]
    assert all(a != b for a, b in zip(plain, mirrored, strict=True))
    assert 16 < sum(mirrored) < 48
    assert torch.equal(out[:, 0], out[:, 1])


@pytest.mark.parametrize(("schedule", "start", "end"), [("cosine", 1, 0), ("onecycle", 0.04, 0), ("constant", 1, 1)])
def test_schedules_start_and_end_where_they_should(schedule, start, end):
    recipe = replace(RECIPE, schedule=schedule)
    factors = [lr_factor(recipe, step / 100) for step in range(101)]
    assert factors[0] == pytest.approx(start)
    assert factors[-1] == pytest.approx(end, abs=1e-12)
    assert max(factors) == pytest.approx(1)
    assert max(abs(a - b) for a, b in pairwise(factors)) < 0.05


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", -1),
        ("batch_size", 0),
        ("lr", -1.0),
        ("lr", math.nan),
        ("optimizer", "lion"),
        ("schedule", "step"),
        ("augment", "mixup"),
        ("precision", "int8"),
        ("momentum", 1.0),
        ("label_smoothing", -0.1),
        ("weight_decay", -1.0),
        ("seed", -1),
    ],
)
def test_a_recipe_that_means_nothing_is_refused(name, value):
    with pytest.raises(UsageError, match=f"{name} .*{value}"):
        Recipe(**{"epochs": 1, name: value})


def test_a_progress_bar_goes_to_stderr_only(model, digits, capsys):
    train(model, digits, replace(RECIPE, epochs=1), progress=True)
    assert capsys.readouterr().out == ""


# -- after fusing ------------------------------------------------------------------------------------

SHORT = Recipe(epochs=3, batch_size=32, lr=1e-3, seed=4)


def mlp(seed: int) -> nn.Module:
    return initialise(lambda: models.mlp((64, 24, 10)), seed)


def run_after(kind: str, model: nn.Module, digits: Split, **options) -> TrainingResult:
    if kind == "fine-tune":
        return fine_tune(model, digits, options.pop("recipe", SHORT), progress=False, **options)
    parents = [initialise(type(model), seed) if isinstance(model, Busy) else mlp(seed) for seed in (7, 8)]
    return distil(model, parents, digits, options.pop("recipe", SHORT), progress=False, **options)


KINDS = pytest.mark.parametrize("kind", ["fine-tune", "distil"])


@KINDS
def test_what_follows_fusing_resumes_bit_for_bit(kind, model, digits, tmp_path, monkeypatch):
    whole = run_after(kind, model, digits)
    path, replaced, left = tmp_path / "run.state", os.replace, [2]

    def stop_after_two(source, target):
        replaced(source, target)
        left[0] -= 1
        if not left[0]:
            raise InterruptedRunError

    monkeypatch.setattr(os, "replace", stop_after_two)
    with pytest.raises(InterruptedRunError):
        run_after(kind, model, digits, state_path=path)
    monkeypatch.undo()
    resumed = run_after(kind, model, digits, state_path=path, resume=True)
    assert same(whole.model, resumed.model)
    assert [epoch.loss for epoch in whole.history] == [epoch.loss for epoch in resumed.history]
    assert not same(whole.model, model)


@KINDS
def test_what_follows_fusing_is_decided_by_its_seed_and_changes_nothing_given(kind, model, digits):
    before, state = copy.deepcopy(model), torch.get_rng_state()
    first, second, other = (run_after(kind, model, digits, recipe=replace(SHORT, seed=s)) for s in (4, 4, 5))
    assert same(first.model, second.model)
    assert not same(first.model, other.model)
    assert same(model, before)
    assert torch.equal(torch.get_rng_state(), state)


@KINDS
def test_a_state_of_another_start_is_refused(kind, digits, tmp_path):
    path = tmp_path / "run.state"
    run_after(kind, mlp(0), digits, state_path=path, recipe=replace(SHORT, epochs=1))
    with pytest.raises(TrainingError, match="of another run: start is"):
        run_after(kind, mlp(1), digits, state_path=path, resume=True, recipe=replace(SHORT, epochs=1))


def test_a_state_of_other_parents_or_another_temperature_is_refused(digits, tmp_path):
    path, recipe = tmp_path / "run.state", replace(SHORT, epochs=1)
    distil(mlp(0), [mlp(1)], digits, recipe, state_path=path, progress=False)
    for parents, temperature, word in (([mlp(2)], 1.0, "parents is"), ([mlp(1)], 2.0, "temperature is")):
        with pytest.raises(TrainingError, match=word):
            distil(
                mlp(0),
                parents,
                digits,
                recipe,
                temperature=temperature,
                state_path=path,
                resume=True,
                progress=False,
            )


def test_fine_tuning_is_training_from_the_network(model, digits):
    assert same(
        fine_tune(model, digits, SHORT, progress=False).model, train(model, digits, SHORT, progress=False).model
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distilling_a_network_from_itself_keeps_it(digits, temperature):
    trained = train(mlp(0), digits, Recipe(epochs=5, batch_size=32), progress=False).model
    result = distil(trained, {"self": trained}, digits, SHORT, temperature=temperature, progress=False)
    assert all(abs(epoch.loss) < 1e-9 for epoch in result.history)
    assert all(epoch.accuracy > 0.99 for epoch in result.history)
    with torch.no_grad():
        torch.testing.assert_close(result.model(digits.images), trained(digits.images), rtol=1e-4, atol=1e-4)


def test_distilling_brings_a_network_to_the_ensemble_of_its_parents(digits):
    parents = [train(mlp(s), digits, Recipe(epochs=10, batch_size=16), progress=False).model for s in (1, 2)]
    result = distil(mlp(0), parents, digits, Recipe(epochs=20, batch_size=16, lr=3e-3), progress=False)
    with torch.no_grad():
        target = torch.stack([parent(digits.images).softmax(1) for parent in parents]).mean(0)
        before, after = (net(digits.images).log_softmax(1) for net in (mlp(0), result.model))
    divergence = [float(nn.functional.kl_div(found, target, reduction="batchmean")) for found in (before, after)]
    assert divergence[1] < divergence[0] / 10
    assert result.history[-1].loss < result.history[0].loss / 5
    assert result.history[-1].accuracy > 0.9


def test_the_first_loss_of_distilling_is_the_divergence_from_the_ensemble(digits):
    parents, recipe = [mlp(1), mlp(2)], Recipe(epochs=1, batch_size=1000, lr=0)
    loss = distil(mlp(0), parents, digits, recipe, temperature=3.0, progress=False).history[0].loss
    with torch.no_grad():
        target = torch.stack([(parent(digits.images) / 3).softmax(1) for parent in parents]).mean(0)
        own = (mlp(0)(digits.images) / 3).softmax(1)
    assert loss == pytest.approx(9 * float((target * (target / own).log()).sum(1).mean()), rel=1e-4)


class LabelsAreSecretError(Exception):
    pass


class Secret:
    """A label that nobody may look at."""

    def __getattr__(self, name):
        raise LabelsAreSecretError(name)


def test_distilling_reads_no_labels(digits):
    wrong = replace(digits, labels=(digits.labels + 1) % 10)
    batches = [(digits.images[:64], Secret()), (digits.images[64:], Secret())]
    expected = distil(mlp(0), [mlp(1)], digits, SHORT, progress=False).model
    for data in (wrong, digits.images, batches):
        assert same(distil(mlp(0), [mlp(1)], data, SHORT, progress=False).model, expected)
    few = distil(mlp(0), [mlp(1)], digits, SHORT, samples=64, progress=False).model
    assert same(few, distil(mlp(0), [mlp(1)], digits.images[:64], SHORT, progress=False).model)


@KINDS
def test_no_epochs_are_refused(kind: str, digits: Split):
    with pytest.raises(UsageError, match="epochs 0 trains nothing; give 1 or more"):
        run_after(kind, mlp(0), digits, recipe=replace(SHORT, epochs=0))


def test_vectors_can_be_trained_on_too():
    x, y = torch.randn(40, 64), torch.arange(40) % 10
    tuned = fine_tune(mlp(0), (x, y), replace(SHORT, epochs=30), progress=False)
    assert tuned.history[-1].loss < tuned.history[0].loss
    assert not same(distil(mlp(0), [mlp(1)], x, SHORT, progress=False).model, mlp(0))
    with pytest.raises(UsageError, match=r"augment 'crop-flip' is for images"):
        fine_tune(mlp(0), (x, y), replace(SHORT, augment="crop-flip"), progress=False)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"parents": []}, UsageError, "no parents"),
        ({"temperature": 0.0}, UsageError, "temperature 0.0"),
        ({"recipe": replace(SHORT, label_smoothing=0.1)}, UsageError, "label_smoothing 0.1"),
        ({"samples": 0}, UsageError, "samples 0"),
        ({"resume": True}, UsageError, "state_path"),
        ({"parents": [models.mlp((64, 3))]}, ModelError, "10, 3 classes"),
        ({"parents": [models.mlp((63, 10))]}, DataError, "do not fit"),
        ({"data": torch.zeros(0, 64)}, DataError, "empty"),
    ],
)
def test_distilling_refuses_what_cannot_be_meant(options, error, words):
    settings = {"parents": [mlp(1)], "data": torch.randn(8, 64), "recipe": SHORT, **options}
    with pytest.raises(error, match=words):
        distil(mlp(0), progress=False, **settings)
