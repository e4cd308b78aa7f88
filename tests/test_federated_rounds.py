"""Whole runs: bit-equal, resumable, and alive when clients are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from federations import config, equal, orders
from weldnet.checkpoints import load, load_into, read_metadata, save
from weldnet.errors import DataError, FederatedError, TrainingError, UsageError
from weldnet.evaluation import evaluate
from weldnet.federated import (
    CHECKPOINT,
    MODEL,
    ClientStore,
    Federation,
    Server,
    simulate,
)
from weldnet.records import read


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rule": "fedavg-uniform", "algorithm": "moon", "server_optimiser": "fedadam"},
        {
            "algorithm": {"name": "moon", "mu": 5.0},
            "projection": 6,
            "server_optimiser": "fedavgm",
            "participation": 0.7,
        },
        {"initialisation": "own", "rule": "fedma", "algorithm": {"name": "fedprox", "mu": 0.1}},
        {"align_at": "client", "rule": "weight_matching", "algorithm": "moon", "initialisation": "own"},
        {"rule": "activation_matching", "server_rows": 32, "server_optimiser": "fedexp", "repair": "refit"},
    ],
    ids=["gamf", "moon+fedadam", "head+fedavgm", "own+fedma", "client", "activations"],
)
def test_two_rounds_and_two_more_are_four(changes: dict[str, Any], tmp_path: Path) -> None:
    whole = simulate(config(rounds=4, **changes), tmp_path / "whole")
    simulate(config(rounds=2, **changes), tmp_path / "parts")
    resumed = simulate(config(rounds=4, **changes), tmp_path / "parts", resume=True)
    assert equal(whole.state, resumed.state)
    one, two = (read(tmp_path / name).of("round") for name in ("whole", "parts"))
    assert [r.cell["round"] for r in two] == [1, 2, 3, 4]
    assert [r.values["accuracy"] for r in one] == [r.values["accuracy"] for r in two]


def test_a_resumed_server_sums_in_the_order_of_the_model(tmp_path: Path) -> None:
    """Files sort their tensors by name; FedExP's step is a sum over all of them."""
    begun = simulate(config(rounds=1, projection=6), tmp_path)
    resumed = Server(begun.federation, tmp_path, resume=True)
    assert list(resumed.state) == list(begun.federation.initial())
    assert list(resumed.state) != sorted(resumed.state)


def test_too_few_rows_for_the_clients_are_said_before_anything_begins(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="300 rows are fewer than 10 for each of 40 networks"):
        simulate(config(clients=40), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_federation_of_another_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="of another config"):
        simulate(config(), tmp_path / "run", federation=Federation(config(seed=1)))


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match="device 'gpu7' cannot be used here"):
        Federation(config(device="gpu7"))


def test_a_round_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    """Killed after the clients of round 3 kept their states, before the server saved itself."""
    changes = {"algorithm": {"name": "moon", "mu": 5.0}, "rounds": 3}
    whole = simulate(config(**changes), tmp_path / "whole")
    simulate(config(**{**changes, "rounds": 2}), tmp_path / "cut")
    before = (tmp_path / "cut" / CHECKPOINT).read_bytes()
    simulate(config(**changes), tmp_path / "cut", resume=True)
    (tmp_path / "cut" / CHECKPOINT).write_bytes(before)
    again = simulate(config(**changes), tmp_path / "cut", resume=True)
    assert equal(whole.state, again.state)
    assert [r.cell["round"] for r in read(tmp_path / "cut").of("round")] == [1, 2, 3]


def test_the_final_model_is_on_disk_and_as_good_as_recorded(tmp_path: Path) -> None:
    server = simulate(config(rounds=3), tmp_path)
    state = load(tmp_path / "global.safetensors")
    assert equal(state, dict(server.state))
    model = server.federation.blueprint.module(state)
    record = read(tmp_path).of("round", round=3)[0]
    assert evaluate(model, server.federation.test_data).accuracy == record.values["accuracy"]
    assert record.values["accuracy"] > 0.4
    assert record.values["bytes_up"] == 3 * sum(t.numel() * 4 for t in state.values())
    assert record.values["moved"] is not None
    assert read(tmp_path).of("run")[0].extra["config"]["clients"] == 3


def test_only_some_rounds_are_evaluated_and_the_last_always(tmp_path: Path) -> None:
    simulate(config(rounds=3, evaluate_every=2), tmp_path)
    assert ["accuracy" in r.values for r in read(tmp_path).of("round")] == [False, True, True]


def test_own_initialisation_begins_apart_and_goes_on_together() -> None:
    federation = Federation(config(initialisation="own", local={"epochs": 0}))
    server_state = federation.initial()
    first = [federation.work(order).update.state for order in orders(federation, server_state, 1)]
    assert not any(equal(state, server_state) for state in first)
    assert not equal(first[0], first[1])
    second = [federation.work(order).update.state for order in orders(federation, server_state, 2)]
    assert all(equal(state, server_state) for state in second)


@pytest.mark.parametrize(
    "more", [{}, {"algorithm": "fedprox"}, {"align_at": "client"}], ids=["plain", "prox", "client"]
)
def test_clients_may_begin_with_other_widths_of_their_own(more: dict[str, Any], tmp_path: Path) -> None:
    widths = [{}, {"sizes": [64, 6, 10]}, {"sizes": [64, 15, 10]}]
    changes = {"initialisation": "own", "rule": "optimal_transport", "own_model_options": widths, **more}
    federation = Federation(config(**changes))
    first = [federation.work(order).update.state for order in orders(federation, federation.initial(), 1)]
    assert [len(state["layers.0.bias"]) for state in first] == ([10] * 3 if "align_at" in more else [10, 6, 15])
    server = simulate(config(**changes), tmp_path)
    assert server.state["layers.0.weight"].shape == (10, 64)
    found = read(tmp_path).of("round")
    assert all(record.values["replies"] == 3 for record in found)
    assert found[0].cell["architecture"] == "mlp of several widths"


def test_clients_that_align_send_the_same_network_in_another_order() -> None:
    changes = {"initialisation": "own", "rule": "weight_matching"}
    here, there = Federation(config(**changes)), Federation(config(**changes, align_at="client"))
    order = orders(here, here.initial(), 1)[0]
    plain, aligned = here.work(order).update, there.work(order).update
    assert aligned.values["moved"] > 0.5
    assert not equal(plain.state, aligned.state)
    for split in (here.test_data,):
        one = here.blueprint.module(plain.state)(split.images)
        torch.testing.assert_close(one, here.blueprint.module(aligned.state)(split.images), rtol=1e-4, atol=1e-5)


def test_every_round_asks_other_clients_and_the_same_ones_again() -> None:
    federation = Federation(config(clients=8, participation=0.5))
    rounds = [federation.chosen(number) for number in range(1, 9)]
    assert all(len(chosen) == 4 for chosen in rounds)
    assert len(set(rounds)) > 1
    assert rounds == [Federation(config(clients=8, participation=0.5)).chosen(number) for number in range(1, 9)]


def test_parts_leave_the_servers_rows_out() -> None:
    federation = Federation(config(server_rows=40))
    rows = torch.cat(list(federation.parts.values()))
    assert len(rows) == 260 == len(rows.unique())
    assert federation.server_data is not None
    assert federation.server_data.shape == (40, 1, 8, 8)


def test_clients_that_fail_are_recorded_and_the_round_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Federation.work

    def sometimes(self: Federation, order: Any, kept: Any = None) -> Any:
        if order.client == "client-01" or order.round == 2:
            raise TrainingError("the loss became nan")
        return work(self, order, kept)

    monkeypatch.setattr(Federation, "work", sometimes)
    states = []
    federation = Federation(config(rounds=2))
    server = simulate(config(rounds=2), tmp_path, federation=federation, on_round=lambda r: states.append(r))
    one, two = read(tmp_path).of("round")
    assert one.extra["failed"] == {"client-01": "the loss became nan"}
    assert one.values["replies"] == 2
    assert two.values["replies"] == 0
    assert two.extra["skipped"]
    assert two.values["accuracy"] == one.values["accuracy"]  # the model was kept
    assert server.round == 2
    assert states == [one, two]


def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Federation, order: Any, kept: Any = None) -> Any:
        raise TrainingError(f"the loss of {order.client} became nan")

    monkeypatch.setattr(Federation, "work", never)


def test_a_run_whose_rounds_all_fail_has_no_model_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"no round of 2 gave a model \(0 sound updates of 0.*client-00: the loss of client-00.*and 2 more"
    with monkeypatch.context() as patch:
        failing(patch)
        for resume in (False, True):
            with pytest.raises(FederatedError, match=message):
                simulate(config(), tmp_path, resume=resume)
    assert not (tmp_path / MODEL).exists()
    assert [r.extra["skipped"] != "" for r in read(tmp_path).of("round")] == [True, True]
    server = simulate(config(rounds=3), tmp_path, resume=True)
    assert server.round == 3
    assert (tmp_path / MODEL).exists()


def test_silent_clients_are_missing_and_too_few_replies_skip_the_round(tmp_path: Path) -> None:
    federation = Federation(config(min_replies=3))
    server = Server(federation, tmp_path)
    before = dict(server.state)
    record = server.receive([federation.work(order).update for order in server.orders()[1:]])
    assert record.extra["missing"] == ["client-00"]
    assert "3 are needed" in record.extra["skipped"]
    assert equal(before, dict(server.state))


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    simulate(config(rounds=1), tmp_path)
    with pytest.raises(FederatedError, match="resume"):
        simulate(config(rounds=1), tmp_path)
    with pytest.raises(FederatedError, match="other settings"):
        simulate(config(rounds=1, seed=1), tmp_path, resume=True)
    tensors, metadata = load(tmp_path / CHECKPOINT), read_metadata(tmp_path / CHECKPOINT)
    save({name.replace("layers.1", "last"): t for name, t in tensors.items()}, tmp_path / CHECKPOINT, metadata=metadata)
    with pytest.raises(FederatedError, match=r"of another model \('last\.bias'\)"):
        simulate(config(rounds=1), tmp_path, resume=True)
    save({"w": torch.zeros(1)}, tmp_path / CHECKPOINT)
    with pytest.raises(FederatedError, match="no state"):
        simulate(config(rounds=1), tmp_path, resume=True)


def test_the_store_keeps_the_last_two_rounds(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    for number in range(1, 5):
        store.save("a", number, {"w": torch.full((1,), float(number))})
    store.save("a", 9, {})
    assert float(store.load("a", 5)["w"]) == 4
    assert float(store.load("a", 4)["w"]) == 3
    assert store.load("a", 3) == {}
    assert store.load("b", 3) == {}


def test_what_another_run_left_is_not_found_and_makes_room(tmp_path: Path) -> None:
    old, new = ClientStore(tmp_path, "old"), ClientStore(tmp_path, "new")
    for number in (1, 2, 5):
        old.save("a", number, {"w": torch.zeros(1)})
    assert new.load("a", 9) == {}
    (tmp_path / "a" / "round-000007.safetensors").write_bytes(b"half a file")
    assert new.load("a", 9) == {}
    new.save("a", 2, {"w": torch.ones(1)})
    assert float(new.load("a", 9)["w"]) == 1
    assert len(list((tmp_path / "a").iterdir())) == 1
    assert old.load("a", 9) == {}


def test_a_new_run_in_an_old_folder_begins_without_the_clients_memories(tmp_path: Path) -> None:
    """MOON with two of three clients a round: who was not asked in round 1 has a memory of the old run only."""
    changes = {"algorithm": {"name": "moon", "mu": 5.0}, "participation": 0.7, "rounds": 4}
    fresh = simulate(config(**changes), tmp_path / "fresh")
    simulate(config(algorithm="moon", rounds=1), tmp_path / "old")
    (tmp_path / "old" / CHECKPOINT).unlink()
    again = simulate(config(**changes), tmp_path / "old")
    assert equal(fresh.state, again.state)


def test_the_model_fits_the_blueprint() -> None:
    federation = Federation(config())
    model = federation.blueprint.module(federation.initial())
    load_into(model, federation.initial(), "again")
    assert federation.blueprint.last == {"layers.1.weight": 0, "layers.1.bias": 0}
