"""Flower's side of federated learning: messages, the grid in one process, the strategy, supervised programs."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("flwr")

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from weldnet.errors import FederatedError, UsageError
from weldnet.federated import Blueprint, ClientUpdate, aggregate
from weldnet.federated.flower import FlowerRound, FusionStrategy, LocalGrid, to_record, to_state

State = dict[str, Tensor]


class Counting(nn.Module):
    """A small network with BatchNorm: running statistics, and an int64 counter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Counting().eval()


def trained(state: State, client: int, number: int) -> State:
    """Stand in for training: the same for every engine and order."""
    generator = torch.Generator().manual_seed(100 * number + client)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor + 7
        for name, tensor in state.items()
    }


def app_of(work: Callable[[State, int, int], State]) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:  # pyright: ignore[reportUnusedFunction]
        client = int(context.node_config["partition-id"])
        number = int(message.content["config"]["server-round"])
        state = work(to_state(message.content["arrays"]), client, number)
        metrics = MetricRecord({"num-examples": 10 + client, "partition-id": client, "loss": 0.5})
        return Message(RecordDict({"arrays": to_record(state), "metrics": metrics}), reply_to=message)

    @app.query()
    def who(message: Message, context: Context) -> Message:  # pyright: ignore[reportUnusedFunction]
        metrics = MetricRecord({"partition-id": int(context.node_config["partition-id"])})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def contexts(clients: int, nodes: list[int] | None = None) -> dict[int, Context]:
    numbers = nodes or [100 + client for client in range(clients)]
    return {
        number: Context(7, number, {"partition-id": client}, RecordDict(), {}) for client, number in enumerate(numbers)
    }


def run(
    strategy: FusionStrategy,
    grid: LocalGrid,
    state: State,
    rounds: int = 1,
    timeout: float | None = None,
) -> State:
    return to_state(strategy.start(grid, to_record(state), rounds, timeout).arrays)


def strategy_of(
    net: nn.Module, clients: int, seen: list[FlowerRound] | None = None, **options: object
) -> FusionStrategy:
    on_round = seen.append if seen is not None else lambda found: None
    blueprint = Blueprint.of(net, torch.zeros(2, 3))
    return FusionStrategy(blueprint, **{"nodes": clients, "on_round": on_round, **options})  # pyright: ignore[reportArgumentType]


def assert_equal(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def test_tensors_of_every_type_travel_bit_for_bit():
    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    state = {str(dtype): (torch.randn(3, 2) * 3).to(dtype) for dtype in types}
    state["scalar"], state["half scalar"] = torch.tensor(5), torch.tensor(0.1, dtype=torch.bfloat16)
    state["transposed"] = torch.randn(3, 4).t()
    state["nan"] = torch.tensor([float("nan"), -0.0])
    found = to_state(to_record(state))
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(
            found[name].contiguous().view(torch.uint8).flatten() if tensor.dim() else found[name],
            tensor.contiguous().view(torch.uint8).flatten() if tensor.dim() else tensor,
        )


@pytest.mark.parametrize("rule", ["fedavg", "gamf", "gamf-uniform", "gamf-joint"])
def test_a_round_on_flower_is_the_pure_function(rule: str):
    net = network()
    state = net.state_dict()
    found = run(strategy_of(net, 3, rule=rule), LocalGrid(app_of(trained), contexts(3)), state)
    updates = [ClientUpdate(client=str(k), state=trained(state, k, 1), examples=10 + k) for k in range(3)]
    blueprint = Blueprint.of(net, torch.zeros(2, 3))
    assert_equal(found, dict(aggregate(updates, state, 1, rule=rule, blueprint=blueprint).state))
    assert found["body.1.num_batches_tracked"].dtype == torch.int64


def test_the_numbers_of_nodes_and_the_order_of_replies_have_no_say():
    class Shuffled:
        """A grid whose replies come in any order."""

        def __init__(self, grid: LocalGrid) -> None:
            self.grid = grid

        def __getattr__(self, name: str) -> object:
            return getattr(self.grid, name)

        def send_and_receive(self, messages: list[Message], *, timeout: float | None = None) -> list[Message]:
            replies = self.grid.send_and_receive(messages, timeout=timeout)
            random.Random(3).shuffle(replies)
            return replies

    net = network()
    results = []
    for nodes in ([1, 2, 3, 4], [40, 7, 23, 5]):
        grid = Shuffled(LocalGrid(app_of(trained), contexts(4, nodes)))
        strategy = strategy_of(net, 4, share=0.5, seed=4)
        results.append(run(strategy, grid, net.state_dict(), rounds=3))  # pyright: ignore[reportArgumentType]
    assert_equal(*results)


def test_failing_silent_and_broken_clients_are_named_and_left_out():
    def work(state: State, client: int, number: int) -> State:
        if client == 1:
            raise ValueError("no samples on this disk")
        if client == 2:
            time.sleep(20)
        new = trained(state, client, number)
        if client == 3:
            new["body.0.weight"][0, 0] = float("nan")
        if client == 4:
            new["body.0.weight"] = new["body.0.weight"][:, :2]
        if client == 5:
            del new["body.3.bias"]
        return new

    net, seen = network(), list[FlowerRound]()
    strategy = strategy_of(net, 7, seen, rule="gamf")
    found = run(strategy, LocalGrid(app_of(work), contexts(7)), net.state_dict(), timeout=2)
    (done,) = seen
    assert done.aggregated.clients == ("0", "6")
    assert done.missing == ("node 102",)
    assert [str(entry) for entry in done.failed] == ["node 101: ValueError: no samples on this disk"]
    assert [entry.client for entry in done.aggregated.dropped] == ["3", "4", "5"]
    assert "no answer from node 102" in str(done)
    assert all(torch.isfinite(tensor).all() for tensor in found.values() if tensor.is_floating_point())


def test_a_round_without_sound_updates_keeps_the_model():
    def work(state: State, client: int, number: int) -> State:
        if number == 1:
            raise RuntimeError("out of memory")
        return trained(state, client, number)

    net, seen = network(), list[FlowerRound]()
    first = run(strategy_of(net, 2, seen), LocalGrid(app_of(work), contexts(2)), net.state_dict())
    assert_equal(first, net.state_dict())
    assert "skipped" in str(seen[0])
    run(strategy_of(net, 2, seen), LocalGrid(app_of(work), contexts(2)), net.state_dict(), rounds=2)
    assert seen[-1].aggregated.clients == ("0", "1")


def test_too_few_nodes_end_the_run_or_are_enough():
    net, seen = network(), list[FlowerRound]()
    grid = LocalGrid(app_of(trained), contexts(2))
    with pytest.raises(FederatedError, match=r"2 of 5 nodes came within 0\.1 s and a round needs 3"):
        run(strategy_of(net, 5, patience=0.1, min_replies=3), grid, net.state_dict())
    run(strategy_of(net, 5, seen, patience=0.1, min_replies=2), grid, net.state_dict())
    assert seen[0].aggregated.clients == ("0", "1")


def test_going_on_is_as_if_never_stopped(tmp_path):
    net = network()
    options = {"rule": "gamf", "optimiser": "fedadam", "share": 0.5, "min_replies": 2, "seed": 1}
    whole = run(strategy_of(net, 4, **options), LocalGrid(app_of(trained), contexts(4)), net.state_dict(), rounds=4)
    kept = {**options, "checkpoint": tmp_path / "state.safetensors", "resume": True}
    run(strategy_of(net, 4, **kept), LocalGrid(app_of(trained), contexts(4)), net.state_dict(), rounds=2)
    second = strategy_of(net, 4, **kept)
    assert second.done == 2
    other = network(9).state_dict()
    assert_equal(run(second, LocalGrid(app_of(trained), contexts(4)), other, rounds=4), whole)
    assert_equal(run(strategy_of(net, 4, **kept), LocalGrid(app_of(trained), contexts(4)), other, rounds=4), whole)
    for other in ({"rule": "fedavg"}, {"optimiser": "fedavgm"}):
        with pytest.raises(FederatedError, match="give its own, or delete it"):
            strategy_of(net, 4, **{**kept, **other})
    narrow = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    for model in (narrow, nn.Sequential(nn.Linear(3, 2))):
        with pytest.raises(FederatedError, match="of another model"):
            strategy_of(model, 4, **kept)


def test_secure_aggregation_is_refused_with_the_way_out():
    net = network()
    with pytest.raises(UsageError, match=r"plain weights.*align_at='client'"):
        strategy_of(net, 2, rule="gamf", secure_aggregation=True)
    with pytest.raises(UsageError, match=r"fedexp needs each client's distance.*fedavgm"):
        strategy_of(net, 2, rule="fedavg", optimiser="fedexp", secure_aggregation=True)
    strategy_of(net, 2, rule="fedavg", optimiser="fedadam", secure_aggregation=True)

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:  # pyright: ignore[reportUnusedFunction]
        return Message(RecordDict({"secaggplus_configs": ConfigRecord({"stage": "setup"})}), reply_to=message)

    with pytest.raises(UsageError, match="align_at='client'"):
        run(strategy_of(net, 2, rule="gamf"), LocalGrid(app, contexts(2)), net.state_dict())
    with pytest.raises(UsageError, match="SecAggPlusWorkflow"):
        run(strategy_of(net, 2, rule="fedavg"), LocalGrid(app, contexts(2)), net.state_dict())


def test_a_client_cannot_change_what_another_one_reads():
    def train(message: Message, context: Context) -> Message:
        config = message.content["config"]
        seen.append(int(config.get("count", 0)))
        config["count"] = seen[-1] + 1
        return Message(RecordDict(), reply_to=message)

    seen: list[int] = []
    grid = LocalGrid(train, contexts(3))
    content = RecordDict({"config": ConfigRecord({"x": 1})})
    list(grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()]))
    assert seen == [0, 0, 0]
    assert dict(content["config"]) == {"x": 1}


def test_messages_can_be_pushed_and_pulled():
    grid = LocalGrid(app_of(trained), contexts(2))
    content = RecordDict({"arrays": to_record(network().state_dict()), "config": ConfigRecord({"server-round": 1})})
    names = grid.push_messages([grid.create_message(content, "train", node, "1") for node in grid.get_node_ids()])
    replies = grid.pull_messages(names)
    assert [reply.metadata.src_node_id for reply in replies] == [100, 101]
    assert grid.pull_messages(names) == []
