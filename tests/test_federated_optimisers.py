"""Server optimisers: their steps against hand-computed ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weldnet.errors import UsageError
from weldnet.federated import (
    OPTIMISERS,
    Blueprint,
    ClientUpdate,
    FedAdam,
    FedAvgM,
    FedExP,
    Step,
    aggregate,
    make_optimiser,
)


def steps(optimiser: object, rounds: int = 2) -> list[float]:
    """Let one weight's mean run ahead of the global one by 1, then by 2, ..."""
    net = nn.Linear(1, 1, bias=False)
    blueprint = Blueprint.of(net, torch.zeros(1, 1))
    weight, kept, found = torch.zeros(1, 1), {}, []
    for number in range(1, rounds + 1):
        sent = [ClientUpdate(client=str(k), state={"weight": weight + number + k}, examples=1) for k in (-1, 1)]
        result = aggregate(
            sent,
            {"weight": weight},
            number,
            rule="fedavg",
            blueprint=blueprint,
            optimiser=optimiser,
            optimiser_state=kept,
        )
        weight, kept = result.state["weight"], result.optimiser_state
        found.append(float(weight))
    return found


def test_fedavgm_by_hand() -> None:
    assert steps(FedAvgM(momentum=0.5, lr=1.0)) == pytest.approx([1.0, 1.0 + 2.5])


def test_fedadam_by_hand() -> None:
    adam = FedAdam(lr=0.1, beta1=0.5, beta2=0.5, tau=0.1)
    v1 = 0.5 * 0.01 + 0.5 * 1
    first = 0.1 * 0.5 / (v1**0.5 + 0.1)
    v2 = 0.5 * v1 + 0.5 * 4
    assert steps(adam) == pytest.approx([first, first + 0.1 * (0.5 * 0.5 + 0.5 * 2) / (v2**0.5 + 0.1)])


def test_fedexp_by_hand() -> None:
    # Changes 0 and 2, mean 1: (0 + 4) / 2 / (2 * 1) = 1, no longer; then 1 and 3, mean 2: 5 / 8 < 1.
    assert steps(FedExP(epsilon=1e-12)) == pytest.approx([1.0, 3.0])
    net = nn.Linear(2, 1, bias=False)
    sent = [
        ClientUpdate(client="a", state={"weight": torch.tensor([[3.0, 1.0]])}, examples=1),
        ClientUpdate(client="b", state={"weight": torch.tensor([[-3.0, 1.0]])}, examples=1),
    ]
    blueprint = Blueprint.of(net, torch.zeros(1, 2))
    found = aggregate(
        sent, {"weight": torch.zeros(1, 2)}, 1, rule="fedavg", blueprint=blueprint, optimiser=FedExP(epsilon=1e-12)
    )
    torch.testing.assert_close(found.state["weight"], torch.tensor([[0.0, 5.0]]))  # eta = 10 / (2 * 1)
    assert found.stats["server_step"] == pytest.approx(5.0)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_complex_weights_keep_their_imaginary_part(name: str) -> None:
    """A step along the imaginary axis is that along the real one, turned."""
    ahead = torch.tensor([1.0, 2.0])
    real = Step({"w": torch.zeros(2)}, {"w": ahead}, frozenset({"w"}), 30.0)
    turned = Step({"w": torch.zeros(2) * 1j}, {"w": ahead * 1j}, frozenset({"w"}), 30.0)
    one, _, numbers = make_optimiser(name)(real, {})
    other, _, also = make_optimiser(name)(turned, {})
    torch.testing.assert_close(other["w"], one["w"] * 1j)
    assert other["w"].dtype == torch.complex64
    assert numbers == pytest.approx(also)


@pytest.mark.parametrize("bad", ["sgd", {"name": "fedadam", "lr": "big"}, {"name": "fedavgm", "mu": 1.0}])
def test_optimisers_that_mean_nothing_are_refused(bad: object) -> None:
    with pytest.raises(UsageError):
        make_optimiser(bad)  # type: ignore[arg-type]
