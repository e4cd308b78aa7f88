"""FedMA's layer rounds: the matching against brute force, and the whole way through a network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import federations
from weldnet.alignment import MatchedAveraging, Problem
from weldnet.alignment.matched_averaging import match_space
from weldnet.checkpoints import load_model
from weldnet.errors import ConfigError, UsageError
from weldnet.evaluation import evaluate
from weldnet.federated import (
    Blueprint,
    ClientUpdate,
    FederatedConfig,
    Federation,
    LayerRounds,
    Server,
    cut_out,
    make_rule,
    simulate,
)
from weldnet.models import mlp
from weldnet.records import read
from weldnet.structure import Structure, Wider, capture, random_renumbering, renumber, widened
from weldnet.training import initialise

X = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def small(seed: int, sizes: tuple[int, ...] = (5, 4, 3)) -> nn.Module:
    return initialise(lambda: mlp(sizes), seed)


class Net(nn.Module):
    """Convolution with BatchNorm, then two linear layers on the flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.hidden = nn.Linear(5 * 16, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        return self.out(self.hidden(x.flatten(1)).relu())


def update(client: str, model: nn.Module, examples: int = 10) -> ClientUpdate:
    return ClientUpdate(client=client, state=model.state_dict(), examples=examples, classes={0: 5, 1: 4, 2: 1})


# -- matching ----------------------------------------------------------------------------------------


def rows_of(models: list[nn.Module]) -> list[Tensor]:
    """What units are compared by: weights and biases on one scale, that of the weights."""
    weights = [m.layers[0].weight.detach().double() for m in models]  # type: ignore[index, union-attr]
    biases = [m.layers[0].bias.detach().double() for m in models]  # type: ignore[index, union-attr]
    scale = lambda tensors: float(torch.stack(tensors).square().mean()) ** 0.5  # noqa: E731
    common = sum(float(w.square().mean()) for w in weights) / len(weights)
    return [
        torch.cat([w / scale(weights), b[:, None] / scale(biases)], 1) * common**0.5
        for w, b in zip(weights, biases, strict=True)
    ]


def worth(a: Tensor, b: Tensor, to: tuple[int, ...], method: MatchedAveraging) -> float:
    """Twice the log posterior of matching b's unit i to a's unit to[i], or to a new one where that is -1."""
    precision, prior = method.sigma**-2, method.sigma0**-2
    total, new = 0.0, 0
    for i, unit in enumerate(to):
        if unit < 0:
            new += 1
            total += float((precision * b[i]).square().sum()) / (prior + precision)
            total += 2 * math.log(method.gamma / 2 / new)
        else:
            total += float((precision * (a[unit] + b[i])).square().sum()) / (prior + 2 * precision)
            total -= float((precision * a[unit]).square().sum()) / (prior + precision)
    return total


def maps(growth: bool) -> Iterator[tuple[int, ...]]:
    for to in itertools.product(range(-1 if growth else 0, 4), repeat=4):
        used = [unit for unit in to if unit >= 0]
        if len(used) == len(set(used)):
            yield to


@pytest.mark.parametrize("growth", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_the_matching_is_the_best_of_all(seed: int, growth: bool) -> None:
    models = [small(2 * seed), small(2 * seed + 1)]
    method = MatchedAveraging(growth=growth, sigma=0.3, sigma0=0.7, gamma=1.5)
    structure = capture(models[0], torch.zeros(1, 5))
    problem = Problem(structure, {"a": models[0].state_dict(), "b": models[1].state_dict()})
    space, targets, units = match_space(method, problem, [])
    assert torch.equal(targets["a"], torch.arange(4))
    a, b = rows_of(models)
    best = max(worth(a, b, to, method) for to in maps(growth))
    found = tuple(t if t < 4 else -1 for t in targets["b"].tolist())
    assert worth(a, b, found, method) == pytest.approx(best, rel=1e-9)
    assert units == 4 + found.count(-1)
    assert space == structure.roots[0].name


def test_one_layer_by_hand() -> None:
    """What is matched is the mean of matched units and the same for all; the next layer reads in the new order."""
    models = [small(0), small(1)]
    rounds = LayerRounds(MatchedAveraging(), Blueprint.of(models[0], torch.zeros(1, 5)))
    found = rounds.match([update("b", models[1], 30), update("a", models[0], 10)], models[0].state_dict())
    assert found is not None
    back = torch.argsort(found.targets["b"])
    w0, w1 = (m.state_dict()["layers.0.weight"] for m in models)
    for client in ("a", "b"):
        torch.testing.assert_close(found.states[client]["layers.0.weight"], 0.25 * w0 + 0.75 * w1[back])
    torch.testing.assert_close(found.states["b"]["layers.1.weight"], models[1].state_dict()["layers.1.weight"][:, back])
    assert torch.equal(found.states["a"]["layers.1.weight"], models[0].state_dict()["layers.1.weight"])
    assert found.frozen == {"layers.0.weight", "layers.0.bias"}
    assert rounds.finished


# -- a whole round -----------------------------------------------------------------------------------


def go_through(rounds: LayerRounds, updates: list[ClientUpdate]) -> dict[str, Tensor]:
    """Match all layers without any training between them."""
    while not rounds.finished:
        found = rounds.match(updates, updates[0].state)
        assert found is not None
        updates = [
            ClientUpdate(client=u.client, state=found.states[u.client], examples=u.examples, classes=u.classes)
            for u in updates
        ]
    state = rounds.finish(updates, updates[0].state)
    assert state is not None
    return state


@pytest.mark.parametrize("growth", [False, True])
def test_renumbered_copies_come_together(growth: bool) -> None:
    net = initialise(Net, 0)
    with torch.no_grad():
        net(X)
    blueprint = Blueprint.of(net, X)
    sent = [update("a", net)]
    for k, name in enumerate("bc"):
        sources = random_renumbering(blueprint.structure, torch.Generator().manual_seed(k))
        state = renumber(net.state_dict(), blueprint.structure, sources)
        sent.append(ClientUpdate(client=name, state=state, examples=5, classes={0: 1}))
    rounds = LayerRounds(MatchedAveraging(growth=growth, sigma=0.1, gamma=1e-3), blueprint)
    found = go_through(rounds, sent)
    torch.testing.assert_close(found, dict(net.state_dict()))


def test_networks_grow_where_units_have_no_counterpart() -> None:
    nets = [initialise(Net, k) for k in range(3)]
    rounds = LayerRounds(MatchedAveraging(growth=True, sigma=0.05, gamma=50.0), Blueprint.of(nets[0], X))
    found = go_through(rounds, [update(str(k), net, 3 + k) for k, net in enumerate(nets)])
    wide = found["hidden.weight"].shape[0]
    assert 6 < wide <= 18
    assert found["out.weight"].shape == (3, wide)
    model = rounds.blueprint.module(found)
    assert model(X).shape == (8, 3)


def test_a_sub_network_is_cut_out_as_it_was_laid_in() -> None:
    net = initialise(Net, 0)
    structure = capture(net, X)
    generator = torch.Generator().manual_seed(0)
    units = {space.name: space.size + 4 for space in structure.roots}
    targets = {s.name: torch.randperm(s.size + 4, generator=generator)[: s.size] for s in structure.roots}
    wider = Wider(structure, {name: t[None] for name, t in targets.items()}, units)
    state = {
        name: widened(name, [t], wider, [1.0]) if t.is_floating_point() else t for name, t in net.state_dict().items()
    }
    blueprint = Blueprint.of(net, X)
    whole: Structure = capture(blueprint.module(state), X)
    cut = cut_out(state, whole, structure, targets)
    assert all(torch.equal(cut[name], tensor) for name, tensor in net.state_dict().items())


def test_blocks_are_refused() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(1, 8, 1)
            self.two = nn.Conv2d(8, 8, 3, padding=1, groups=4)
            self.out = nn.Linear(8 * 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.two(self.one(x).relu()).relu().flatten(1))

    with pytest.raises(UsageError, match="blocks"):
        LayerRounds(MatchedAveraging(), Blueprint.of(Grouped(), X))


# -- runs --------------------------------------------------------------------------------------------


def config(**changes: Any) -> FederatedConfig:
    own = {"model_options": {"sizes": [64, 12, 8, 10]}, "rule": "fedma-layers", "initialisation": "own"}
    return federations.config(**{**own, **changes})


@pytest.mark.parametrize(
    "rule",
    ["fedma-layers", {"name": "fedma", "layers": True, "growth": True, "sigma": 0.1, "gamma": 30.0}],
    ids=["layers", "growth"],
)
def test_one_round_and_two_more_are_three(rule: Any, tmp_path: Path) -> None:
    changes = {"rule": rule, "participation": 0.7, "clients": 4}
    whole = simulate(config(rounds=3, **changes), tmp_path / "whole")
    simulate(config(rounds=1, **changes), tmp_path / "parts")
    parts = simulate(config(rounds=3, **changes), tmp_path / "parts", resume=True)
    assert whole.state.keys() == parts.state.keys()
    assert all(torch.equal(whole.state[name], parts.state[name]) for name in whole.state)
    model = load_model(tmp_path / "whole" / "global.safetensors", whole.federation.blueprint.model)
    record = read(tmp_path / "whole").of("round", round=3)[0]
    assert evaluate(model, whole.federation.test_data).accuracy == record.values["accuracy"]
    assert (record.values["units"] > 20) == (rule != "fedma-layers")


def test_every_phase_freezes_one_layer_more(tmp_path: Path) -> None:
    federation = Federation(config(rounds=1))
    server = Server(federation, tmp_path)
    seen, record = [], None
    while record is None:
        orders = server.orders()
        seen.append((orders[0].phase, len(orders[0].frozen)))
        first = {name: [order.state[name] for order in orders] for name in orders[0].frozen}
        assert all(torch.equal(t, tensors[0]) for tensors in first.values() for t in tensors)
        record = server.receive([federation.work(order).update for order in orders])
    assert seen == [(0, 0), (1, 2), (2, 4)]
    assert server.done
    assert record.values["bytes_up"] == 3 * 3 * sum(t.numel() * 4 for t in server.state.values())


def test_too_few_clients_skip_the_round(tmp_path: Path) -> None:
    federation = Federation(config(rounds=1))
    server = Server(federation, tmp_path)
    before = dict(server.state)
    record = server.receive([federation.work(server.orders()[0]).update])
    assert record is not None
    assert "fewer than 2" in record.extra["skipped"]
    assert all(torch.equal(before[name], server.state[name]) for name in before)


def test_clients_may_fall_out_between_phases(tmp_path: Path) -> None:
    federation = Federation(config(rounds=1))
    server = Server(federation, tmp_path)
    server.receive([federation.work(order).update for order in server.orders()])
    server.receive([federation.work(order).update for order in server.orders()[1:]])
    assert [order.client for order in server.orders()] == ["client-01", "client-02"]
    record = server.receive([federation.work(order).update for order in server.orders()])
    assert record is not None
    assert record.extra["clients"] == ["client-01", "client-02"]
    assert record.extra["missing"] == ["client-00"]


def test_min_replies_hold_after_the_last_layer_too(tmp_path: Path) -> None:
    server = Server(federation := Federation(config(rounds=1, min_replies=3)), tmp_path)
    before, record = dict(server.state), None
    while record is None:
        orders = server.orders()
        answering = orders[1:] if orders[0].phase == 2 else orders
        record = server.receive([federation.work(order).update for order in answering])
    assert record.extra["skipped"] == "2 sound updates after the last layer, and 3 are needed"
    assert all(torch.equal(before[name], server.state[name]) for name in before)


def test_layers_go_without_server_optimiser() -> None:
    with pytest.raises(ConfigError, match="fedadam"):
        config(server_optimiser="fedadam")
    with pytest.raises(UsageError, match="layers"):
        make_rule({"name": "fedma", "growth": True})
    assert make_rule("fedma-layers-growth-uniform").name == "fedma-layers-growth-uniform"
