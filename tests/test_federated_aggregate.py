"""Aggregation: laws of every rule, and updates that must not count."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from federations import equal
from weldnet.alignment import METHODS, OptimalTransport
from weldnet.checkpoints import save
from weldnet.errors import CheckpointError, UsageError
from weldnet.federated import (
    Blueprint,
    ClientUpdate,
    FedAvg,
    FedAvgM,
    FedMA,
    Matched,
    StateFile,
    aggregate,
    make_rule,
)
from weldnet.models import mlp
from weldnet.structure import random_renumbering, renumber
from weldnet.training import initialise

X = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
DATA_METHODS = [name for name, kind in METHODS.items() if kind().needs_data]
RULES = [
    "fedavg",
    "fedavg-uniform",
    "fedma",
    *[name for name in METHODS if name not in DATA_METHODS],
    "gamf-joint",
    "weight_matching-uniform",
]


class Net(nn.Module):
    """Convolution, BatchNorm with its counter, two linear layers."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.hidden = nn.Linear(5 * 16, width)
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        return self.out(self.hidden(x.flatten(1)).relu())


def state(seed: int, width: int = 6) -> dict[str, Tensor]:
    net = initialise(lambda: Net(width), seed)
    with torch.no_grad():
        net.train()(X + seed)
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


@pytest.fixture(scope="module")
def blueprint() -> Blueprint:
    return Blueprint.of(Net(), X)


def update(client: str, tensors: Mapping[str, Tensor], examples: int = 10) -> ClientUpdate:
    return ClientUpdate(client=client, state=tensors, examples=examples, classes={0: 3, 1: 4, 2: examples})


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("began", [True, False])
def test_clients_equal_to_the_reference_give_the_reference(rule: str, began: bool, blueprint: Blueprint) -> None:
    reference = state(1)
    sent = [update(f"c{k}", state(1), examples=7 + k) for k in range(3)]
    found = aggregate(sent, reference, 1, rule=rule, blueprint=blueprint, began=began)
    assert equal(found.state, reference)
    assert not found.dropped
    assert found.clients == ("c0", "c1", "c2")


@pytest.mark.parametrize(
    "rule", [rule for rule in RULES if make_rule(rule).name not in ("fedavg", "fedavg-uniform", "identity")]
)
def test_clients_that_are_the_reference_renumbered_are_brought_back(rule: str, blueprint: Blueprint) -> None:
    reference = state(1)
    sent = []
    for k in range(3):
        sources = random_renumbering(blueprint.structure, torch.Generator().manual_seed(k))
        sent.append(update(f"c{k}", renumber(reference, blueprint.structure, sources)))
    found = aggregate(sent, reference, 1, rule=rule, blueprint=blueprint)
    torch.testing.assert_close(dict(found.state), reference)
    assert found.stats["moved"] > 0.3


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_arrival_does_not_matter(rule: str, blueprint: Blueprint) -> None:
    reference, sent = state(0), [update(f"c{k}", state(k), 5 * k) for k in range(1, 4)]
    one = aggregate(sent, reference, 2, rule=rule, blueprint=blueprint, optimiser="fedexp")
    two = aggregate([sent[2], sent[0], sent[1]], reference, 2, rule=rule, blueprint=blueprint, optimiser="fedexp")
    assert equal(one.state, two.state)
    assert one.moved == two.moved


def test_weights_are_by_samples_or_uniform(blueprint: Blueprint) -> None:
    reference, a, b = state(0), state(1), state(2)
    sent = [update("a", a, 30), update("b", b, 10)]
    by_samples = aggregate(sent, reference, 1, rule="fedavg", blueprint=blueprint)
    uniform = aggregate(sent, reference, 1, rule="fedavg-uniform", blueprint=blueprint)
    torch.testing.assert_close(by_samples.state["conv.weight"], 0.75 * a["conv.weight"] + 0.25 * b["conv.weight"])
    torch.testing.assert_close(uniform.state["norm.running_var"], (a["norm.running_var"] + b["norm.running_var"]) / 2)
    assert by_samples.shares == {"a": 0.75, "b": 0.25}
    assert "moved" not in by_samples.stats


def test_counters_stay_integers_and_take_the_largest(blueprint: Blueprint) -> None:
    sent = [update("a", state(1)), update("b", {**state(2), "norm.num_batches_tracked": torch.tensor(9)})]
    found = aggregate(sent, state(0), 1, rule="gamf", blueprint=blueprint).state["norm.num_batches_tracked"]
    assert found.dtype == torch.int64
    assert int(found) == 9


class Settled(Net):
    """With whole numbers that are settings, a truth value, and a counter in a box of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(4))
        self.register_buffer("on", torch.tensor(True))
        self.register_buffer("steps", torch.tensor([0]))


@pytest.mark.parametrize("rule", ["fedavg", "gamf", "gamf-joint", "optimal_transport", "fedma"])
@pytest.mark.parametrize("place", ["a", "z"], ids=["first", "last"])
@pytest.mark.parametrize(
    "change", [{"order": torch.tensor([0, 1, 3, 2])}, {"on": torch.tensor(False)}], ids=["integers", "truth"]
)
def test_a_client_with_other_settings_in_whole_numbers_is_dropped(
    change: dict[str, Tensor], place: str, rule: str
) -> None:
    blueprint = Blueprint.of(Settled(), X)
    more = {"order": torch.arange(4), "on": torch.tensor(True)}
    good = [update(f"m{k}", {**state(k), **more, "steps": torch.tensor([k])}) for k in (1, 2)]
    reference = {**state(0), **more, "steps": torch.tensor([0])}
    found = aggregate([*good, update(place, {**good[0].state, **change})], reference, 1, rule=rule, blueprint=blueprint)
    (entry,) = found.dropped
    assert entry.client == place
    assert "differ from the server's" in entry.reason
    assert next(iter(change)) in entry.reason
    assert found.clients == ("m1", "m2")
    assert equal(found.state, aggregate(good, reference, 1, rule=rule, blueprint=blueprint).state)
    assert equal({n: found.state[n] for n in more}, more)
    assert found.state["steps"].tolist() == [2]


@pytest.mark.parametrize("shape", [(1,), (2,)], ids=str)
def test_a_counter_of_another_shape_drops_its_client(shape: tuple[int, ...], blueprint: Blueprint) -> None:
    sent = [update("a", {**state(1), "norm.num_batches_tracked": torch.ones(shape).long()}), update("b", state(2))]
    for rule in ("fedavg", "gamf-joint", "optimal_transport"):
        found = aggregate(sent, state(0), 1, rule=rule, blueprint=blueprint)
        assert found.clients == ("b",)
        assert "norm.num_batches_tracked has shape" in found.dropped[0].reason


def test_bad_updates_are_dropped_and_named(blueprint: Blueprint) -> None:
    good, reference = state(1), state(0)
    nan = {**good, "hidden.weight": good["hidden.weight"].clone().fill_(float("nan"))}
    fine = mlp((16, 4, 3)).state_dict()
    sent = [
        update("good", good),
        update("nan", nan),
        update("shape", state(1, width=7)),
        update("other", fine),
        update("nothing", good, examples=0),
        update("twin", good),
        update("twin", state(3)),
        update("floats", {**good, "norm.num_batches_tracked": torch.tensor(1.0)}),
    ]
    found = aggregate(sent, reference, 1, rule="fedavg", blueprint=blueprint)
    reasons = {entry.client: entry.reason for entry in found.dropped}
    assert found.clients == ("good",)
    assert set(reasons) == {"nan", "shape", "other", "nothing", "twin", "floats"}
    assert "NaN" in reasons["nan"]
    assert "hidden.weight" in reasons["shape"]
    assert "architecture" in reasons["other"]
    assert "0 samples" in reasons["nothing"]
    assert "2 different updates" in reasons["twin"]
    assert equal(found.state, good)


def test_states_may_stay_on_disk_and_one_is_in_memory_at_a_time(blueprint: Blueprint, tmp_path: Path) -> None:
    sent, read = [update(f"c{k}", state(k)) for k in range(1, 4)], []

    class Watched(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            read.append((self.client, name))  # type: ignore[attr-defined]
            return super().__getitem__(name)

    lazy, watched = [], []
    for one in sent:
        save(one.state, tmp_path / f"{one.client}.safetensors")
        lazy.append(dataclasses.replace(one, state=StateFile(tmp_path / f"{one.client}.safetensors")))
        mapping = Watched(one.state)
        mapping.client = one.client  # type: ignore[attr-defined]
        watched.append(dataclasses.replace(one, state=mapping))
    results = [aggregate(u, state(0), 1, rule="gamf", blueprint=blueprint).state for u in (sent, lazy, watched)]
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])
    assert [client for client, _ in read] == [f"c{k}" for k in range(1, 4) for _ in state(0)]  # each once, in turn


def test_a_file_that_is_gone_drops_its_client(blueprint: Blueprint, tmp_path: Path) -> None:
    save(state(1), tmp_path / "a.safetensors")
    lazy = update("a", StateFile(tmp_path / "a.safetensors"))
    (tmp_path / "a.safetensors").unlink()
    found = aggregate([lazy, update("b", state(2))], state(0), 1, rule="fedavg", blueprint=blueprint)
    assert [entry.client for entry in found.dropped] == ["a"]
    with pytest.raises(CheckpointError, match="cannot be read"):
        StateFile(tmp_path / "a.safetensors")


def test_two_updates_of_one_client_that_cannot_be_read_drop_it(blueprint: Blueprint, tmp_path: Path) -> None:
    save(state(1), tmp_path / "a.safetensors")
    lazy = update("a", StateFile(tmp_path / "a.safetensors"))
    (tmp_path / "a.safetensors").unlink()
    found = aggregate([lazy, lazy, update("b", state(2))], state(0), 1, rule="fedavg", blueprint=blueprint)
    assert found.clients == ("b",)
    assert "2 different updates" in found.dropped[0].reason


def test_a_repeated_update_counts_once(blueprint: Blueprint) -> None:
    sent = [update("a", state(1)), update("a", state(1)), update("b", state(2))]
    found = aggregate(sent, state(0), 1, rule="fedavg", blueprint=blueprint)
    assert found.clients == ("a", "b")
    assert "2 times" in found.dropped[0].reason
    assert equal(found.state, aggregate(sent[1:], state(0), 1, rule="fedavg", blueprint=blueprint).state)


@pytest.mark.parametrize("rule", ["fedavg", "gamf", "gamf-joint", "fedma"])
def test_if_all_fail_the_round_is_skipped_and_the_model_kept(rule: str, blueprint: Blueprint) -> None:
    reference, before = state(0), {"momentum/conv.weight": torch.ones(5, 1, 3, 3)}
    sent = [update("a", state(1), examples=0), update("b", {})]
    found = aggregate(sent, reference, 1, rule=rule, blueprint=blueprint, optimiser=FedAvgM(), optimiser_state=before)
    assert equal(found.state, reference)
    assert found.skipped
    assert len(found.dropped) == 2
    assert equal(found.optimiser_state, before)


def test_a_round_needs_enough_updates(blueprint: Blueprint) -> None:
    found = aggregate([update("a", state(1))], state(0), 1, rule="fedavg", blueprint=blueprint, min_updates=2)
    assert "1 sound updates of 1, and 2 are needed" in found.skipped
    assert equal(found.state, state(0))


def test_a_client_of_another_width_comes_to_the_servers(blueprint: Blueprint) -> None:
    reference = state(0)
    sent = [update("same", state(1)), update("narrow", state(2, width=4)), update("wide", state(3, width=9))]
    found = aggregate(sent, reference, 1, rule="optimal_transport", blueprint=blueprint)
    assert found.clients == ("narrow", "same", "wide")
    assert {n: t.shape for n, t in found.state.items()} == {n: t.shape for n, t in reference.items()}


@pytest.mark.parametrize("widths", [(4, 6, 9), (4, 9, 5)], ids=["one fits", "none fits"])
def test_clients_of_other_widths_that_began_apart_come_to_the_servers(
    widths: tuple[int, ...], blueprint: Blueprint
) -> None:
    reference = state(0)
    sent = [update(f"c{k}", state(k, width=width)) for k, width in enumerate(widths, start=1)]
    found = aggregate(sent, reference, 1, rule="optimal_transport", blueprint=blueprint, began=False)
    assert not found.dropped
    assert {n: t.shape for n, t in found.state.items()} == {n: t.shape for n, t in reference.items()}


def test_fedma_weighs_the_last_layer_by_class_counts(blueprint: Blueprint) -> None:
    base = state(1)
    other = {**base, "out.bias": base["out.bias"] + torch.tensor([1.0, 2.0, 4.0])}
    sent = [
        ClientUpdate(client="a", state=base, examples=30, classes={0: 3, 1: 1}),
        ClientUpdate(client="b", state=other, examples=10, classes={0: 1}),
    ]
    found = aggregate(sent, base, 1, rule="fedma", blueprint=blueprint).state["out.bias"] - base["out.bias"]
    # class 0: 1 of 4 samples are b's; class 1: none; class 2: nobody has it, so by samples, 10 of 40.
    torch.testing.assert_close(found, torch.tensor([0.25, 0.0, 1.0]))


def test_fedma_without_class_counts_drops_the_client(blueprint: Blueprint) -> None:
    sent = [update("a", state(1)), dataclasses.replace(update("b", state(1)), classes=None)]
    found = aggregate(sent, state(0), 1, rule=FedMA(), blueprint=blueprint)
    assert "class counts" in found.dropped[0].reason


@pytest.mark.parametrize("name", DATA_METHODS)
def test_methods_that_look_at_activations_take_the_servers_inputs(name: str, blueprint: Blueprint) -> None:
    reference = state(1)
    sources = random_renumbering(blueprint.structure, torch.Generator().manual_seed(3))
    sent = [update("a", renumber(reference, blueprint.structure, sources))]
    found = aggregate(sent, reference, 1, rule=name, blueprint=blueprint, data=X)
    torch.testing.assert_close(dict(found.state), reference)
    with pytest.raises(UsageError, match="data"):
        aggregate(sent, reference, 1, rule=name, blueprint=blueprint)


@pytest.mark.parametrize("rule", ["fedavg", "weight_matching", "optimal_transport"])
def test_repairs_know_who_went_where(rule: str, blueprint: Blueprint) -> None:
    """Mended with the parents' couplings, the mean answers more as their ensemble does."""
    reference = state(1)
    sent = [update("a", state(2)), update("b", state(3))]
    plain = aggregate(sent, reference, 1, rule=rule, blueprint=blueprint)
    mended = aggregate(sent, reference, 1, rule=rule, blueprint=blueprint, repair="refit", data=X)
    assert not equal(plain.state, mended.state)

    def distance(found: Mapping[str, Tensor]) -> float:
        ensemble = torch.stack([blueprint.module(u.state).eval()(X) for u in sent]).mean(0)
        return (blueprint.module(found).eval()(X) - ensemble).norm().item()

    assert distance(mended.state) < 0.8 * distance(plain.state)


def test_optimisers_leave_buffers_alone(blueprint: Blueprint) -> None:
    sent = [update("a", state(1))]
    found = aggregate(sent, state(0), 1, rule="fedavg", blueprint=blueprint, optimiser=FedAvgM(lr=3.0))
    assert torch.equal(found.state["norm.running_var"], state(1)["norm.running_var"])
    assert not torch.equal(found.state["conv.weight"], state(1)["conv.weight"])


# -- names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_rules_are_made_by_their_names(name: str) -> None:
    assert make_rule(name).name == name
    assert make_rule(name) == make_rule(name)
    assert make_rule(make_rule(name)) == make_rule(name)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("gamff", "unknown rule 'gamff'"),
        ({"name": "gamf", "sigmma": 1.0}, "no option 'sigmma'"),
        ({"name": "fedavg", "anchor": "joint"}, "no option 'anchor'"),
        ({"name": "gamf", "anchor": "first"}, "'reference' or 'joint'"),
        ({"name": "gamf", "weighting": "n"}, "'examples' or 'uniform'"),
        ({"weighting": "uniform"}, "has no name"),
        ({"name": "matched_averaging", "growth": True}, "FedMA"),
        (FedAvg, "give a name"),
    ],
)
def test_rules_that_mean_nothing_are_refused(rule: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_rule(rule)  # type: ignore[arg-type]


def test_a_moving_reference_is_refused() -> None:
    with pytest.raises(UsageError, match="joint"):
        Matched(method=OptimalTransport(barycentre=True))
