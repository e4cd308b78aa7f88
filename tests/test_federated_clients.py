"""Client algorithms: their terms against hand-computed values and autograd, and what they keep."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from weldnet.data import Split, load
from weldnet.errors import CheckpointError, ModelError, UsageError
from weldnet.federated import (
    ALGORITHMS,
    ClientAlgorithm,
    FedProx,
    Moon,
    Plain,
    Task,
    contrast,
    make_algorithm,
    train_locally,
    with_head,
)
from weldnet.models import mlp, resnet20, simple_cnn, vgg11
from weldnet.training import Recipe, initialise

DIGITS = load("digits", split="train", limit=96)
RECIPE = Recipe(epochs=1, batch_size=32, lr=0.05, optimizer="sgd", momentum=0.9, schedule="constant", seed=3)


def network(seed: int = 0) -> nn.Module:
    return initialise(lambda: mlp((64, 12, 8, 10)), seed)


def task(model: nn.Module, sent: nn.Module | None = None, data: Split = DIGITS, **options: object) -> Task:
    sent_state = {n: t.clone() for n, t in (sent or model).state_dict().items()}
    return Task(model=model, data=data, recipe=RECIPE, sent=sent_state, **options)  # type: ignore[arg-type]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_moons_loss_is_the_hand_computed_one() -> None:
    z = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    near = torch.tensor([[0.0, 2.0], [4.0, 3.0]])
    far = torch.tensor([[1.0, 1.0], [-3.0, -4.0]])
    by_hand = []
    for near_cos, far_cos in ((0.0, 1 / math.sqrt(2)), (24 / 25, -1.0)):
        a, b = math.exp(near_cos / 0.5), math.exp(far_cos / 0.5)
        by_hand.append(-math.log(a / (a + b)))
    assert float(contrast(z, near, far, 0.5)) == pytest.approx(sum(by_hand) / 2, rel=1e-6)


def test_moons_first_step_is_that_of_its_formula() -> None:
    """One batch, one plain SGD step: the step is the gradient of cross-entropy + mu contrast, computed anew."""
    model, sent, before = network(1), network(2), network(3)
    recipe = Recipe(epochs=1, batch_size=96, lr=0.1, optimizer="sgd", momentum=0.0, schedule="constant")
    given = Task(
        model=model,
        data=DIGITS,
        recipe=recipe,
        sent=sent.state_dict(),
        client_state={f"previous/{n}": t for n, t in before.state_dict().items()},
    )
    found = train_locally(Moon(mu=2.0, temperature=0.5), given).state

    def view(net: nn.Module, x: Tensor) -> Tensor:
        first, second, _ = net.layers  # type: ignore[misc]
        return second(first(x.flatten(1)).relu()).relu()

    x, y = DIGITS.images, DIGITS.labels
    z = view(model, x)
    near, far = view(sent, x).detach(), view(before, x).detach()
    norm = lambda a, b: (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))  # noqa: E731
    a, b = (norm(z, near) / 0.5).exp(), (norm(z, far) / 0.5).exp()
    loss = nn.functional.cross_entropy(model(x), y) - 2.0 * (a / (a + b)).log().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.detach() - 0.1 * parameter.grad, rtol=1e-4, atol=1e-6)


def test_moon_keeps_its_network_and_uses_it() -> None:
    model = network()
    first = train_locally(Moon(mu=5.0), task(model))
    plain = train_locally(Plain(), task(model))
    assert same(first.state, plain.state)  # there is no last network yet
    assert same({n: first.client_state[f"previous/{n}"] for n in first.state}, first.state)
    second = train_locally(Moon(mu=5.0), task(model, client_state=first.client_state))
    assert not same(second.state, plain.state)


def test_moon_forgets_a_network_whose_units_are_in_an_order_of_their_own() -> None:
    assert train_locally(Moon(), task(network(1), network(2), began=False)).client_state == {}


def test_fedproxs_term_is_that_of_autograd() -> None:
    model, sent = network(1), network(2)
    objective = FedProx(mu=0.3).objective(task(model, sent))
    objective.attach(model)
    term = objective.term()  # type: ignore[attr-defined]
    by_hand = sum(
        float((p.detach().double() - q.detach().double()).square().sum())
        for p, q in zip(model.parameters(), sent.parameters(), strict=True)
    )
    assert term.item() == pytest.approx(0.15 * by_hand, rel=1e-5)
    grads = torch.autograd.grad(term, list(model.parameters()))
    for grad, p, q in zip(grads, model.parameters(), sent.parameters(), strict=True):
        torch.testing.assert_close(grad, 0.3 * (p - q).detach())


def test_fedprox_leaves_the_term_out_where_training_began_elsewhere() -> None:
    model, sent = network(1), network(2)
    apart = [train_locally(a, task(model, sent, began=False)).state for a in (FedProx(mu=5.0), Plain())]
    near = [train_locally(a, task(model, sent)).state for a in (FedProx(mu=5.0), Plain())]
    assert same(*apart)
    assert not same(*near)


def test_fedprox_stays_nearer() -> None:
    model = network()
    start = model.state_dict()

    def distance(algorithm: ClientAlgorithm) -> float:
        state = train_locally(algorithm, task(model)).state
        return sum(float((state[n] - start[n]).square().sum()) for n in state)

    assert same(train_locally(FedProx(mu=0.0), task(model)).state, train_locally(Plain(), task(model)).state)
    assert distance(FedProx(mu=10.0)) < 0.5 * distance(Plain())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_training_is_pure_and_repeatable(name: str) -> None:
    model = network()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    kept = {f"previous/{n}": t for n, t in network(9).state_dict().items()}
    one, two = (train_locally(make_algorithm(name), task(model, client_state=kept)) for _ in range(2))
    assert same(one.state, two.state)
    assert same(before, model.state_dict())
    assert not same(one.state, before)
    assert one.values["loss"] > 0


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_is_frozen_does_not_change(name: str) -> None:
    model = network()
    frozen = frozenset({"layers.0.weight", "layers.0.bias"})
    kept = {f"previous/{n}": t for n, t in network(9).state_dict().items()}
    found = train_locally(make_algorithm(name), task(model, frozen=frozen, client_state=kept)).state
    for tensor in found:
        assert torch.equal(found[tensor], model.state_dict()[tensor]) == (tensor in frozen)
    everything = frozenset(model.state_dict())
    assert same(train_locally(make_algorithm(name), task(model, frozen=everything)).state, dict(model.state_dict()))


def test_frozen_buffers_stay_too() -> None:
    model = initialise(
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10)), 0
    )
    found = train_locally(Plain(), task(model, frozen=frozenset({"1.running_mean"}))).state
    assert torch.equal(found["1.running_mean"], torch.zeros(4))
    assert not torch.equal(found["1.running_var"], torch.ones(4))


def test_unknown_frozen_tensors_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'layers\.7\.weight'"):
        train_locally(Plain(), task(network(), frozen=frozenset({"layers.7.weight"})))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (mlp((64, 12, 10)), torch.zeros(2, 1, 8, 8)),
        (simple_cnn(image_size=8), torch.zeros(2, 1, 8, 8)),
        (vgg11(width=0.05), torch.zeros(2, 3, 32, 32)),
        (resnet20(width=0.25), torch.zeros(2, 3, 32, 32)),
    ],
    ids=["mlp", "cnn", "vgg", "resnet"],
)
def test_heads_take_the_place_of_the_last_layer(model: nn.Module, x: Tensor) -> None:
    headed = with_head(model, 7)
    features = headed.body(x)
    assert features.shape == (2, headed.hidden.in_features)
    assert headed.hidden.weight.shape[0] == headed.hidden.weight.shape[1]
    expected = headed.classifier(headed.projection(headed.hidden(features).relu()))
    torch.testing.assert_close(headed(x), expected)
    assert expected.shape == model(x).shape


def test_moon_contrasts_what_the_projection_gives() -> None:
    model = initialise(lambda: with_head(mlp((64, 12, 10)), 5), 0)
    kept = {f"previous/{n}": t for n, t in initialise(lambda: with_head(mlp((64, 12, 10)), 5), 1).state_dict().items()}
    objective = Moon().objective(task(model, client_state=kept))
    objective.attach(model)
    rows = torch.arange(4)
    objective(model(DIGITS.images[:4]), rows, DIGITS.images[:4])
    assert objective._own.z.shape == (4, 5)  # type: ignore[attr-defined]


def test_models_without_a_linear_layer_have_no_head() -> None:
    with pytest.raises(ModelError, match="no linear layer"):
        with_head(nn.Sequential(nn.Conv2d(1, 3, 3)))


@pytest.mark.parametrize(
    "bad", ["sgd", {"name": "moon", "mu": -1.0}, {"name": "moon", "temperature": 0.0}, {"name": "fedprox", "nu": 1.0}]
)
def test_algorithms_that_mean_nothing_are_refused(bad: object) -> None:
    with pytest.raises(UsageError):
        make_algorithm(bad)  # type: ignore[arg-type]
