"""Whole federated runs through Flower's interfaces, from a config, in this process."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("flwr")

from flwr.app import Context, RecordDict

from federations import config, rounds, same, written
from weldnet.checkpoints import read_metadata
from weldnet.cli import main
from weldnet.errors import DataError, FederatedError, TrainingError, UsageError
from weldnet.federated import (
    CHECKPOINT,
    CLIENTS,
    MODEL,
    ClientStore,
    FederatedConfig,
    Federation,
    Order,
    Worked,
    simulate,
)
from weldnet.federated.flower import LocalGrid, Plan, client_app, federate, run_rounds
from weldnet.federated.flower._memory import ClientMemory
from weldnet.records import Record


def without_time(records: list[Record]) -> list[object]:
    """Return what records say, but for what a clock said."""
    return [(r.key, r.cell, {k: v for k, v in r.values.items() if "seconds" not in k}, dict(r.extra)) for r in records]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rule": "fedavg-uniform", "algorithm": "moon", "server_optimiser": "fedadam", "participation": 0.7},
        {"initialisation": "own", "rule": "gamf-joint", "algorithm": {"name": "fedprox", "mu": 0.1}},
        {"align_at": "client", "rule": "weight_matching", "algorithm": "moon"},
        {"initialisation": "own", "rule": {"name": "fedma", "layers": True, "growth": True}},
    ],
    ids=["gamf", "moon+fedadam", "own+joint", "client", "layers"],
)
def test_the_local_engine_is_the_plain_simulation(changes: dict[str, Any], tmp_path: Path):
    settings = config(**changes)
    simulate(settings, tmp_path / "plain")
    shown: list[Record] = []
    assert federate(settings, tmp_path / "local", on_round=shown.append) == tmp_path / "local" / MODEL
    assert same(tmp_path / "plain", tmp_path / "local")
    assert without_time(rounds(tmp_path / "plain")) == without_time(rounds(tmp_path / "local"))
    assert [record.cell["round"] for record in shown] == [1, 2]


def test_a_run_that_was_cut_off_goes_on_bit_for_bit(tmp_path: Path):
    settings = config(rounds=4, algorithm="moon", server_optimiser="fedavgm", participation=0.7)
    federate(settings, tmp_path / "whole")

    def cut(record: Record) -> None:
        if record.cell["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federate(settings, tmp_path / "cut", on_round=cut)
    # Clients may have gone further than the server: what they kept of a round that never was has no say.
    federation = Federation(settings)
    store = ClientStore(tmp_path / "cut" / CLIENTS, read_metadata(tmp_path / "cut" / CHECKPOINT)["run"])
    for client in federation.chosen(3):
        store.save(client, 3, {f"previous/{name}": tensor + 1 for name, tensor in federation.initial().items()})
    with pytest.raises(FederatedError, match="holds a run already; resume it"):
        federate(settings, tmp_path / "cut")
    federate(settings, tmp_path / "cut", Plan(resume=True))
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert [record.cell["round"] for record in rounds(tmp_path / "cut")] == [1, 2, 3, 4]


def test_a_run_that_is_killed_by_force_goes_on_bit_for_bit(tmp_path: Path):
    changes = {"rounds": 6, "algorithm": "moon", "local": {"epochs": 8, "batch_size": 16, "lr": 0.05}}
    path, out = written(tmp_path, **changes), tmp_path / "run"
    line = [
        sys.executable,
        "-c",
        f"from weldnet.cli import main; main(['federate', {str(path)!r}, '-o', {str(out)!r}])",
    ]
    running = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    for said in running.stderr:
        if "round 2:" in said:
            break
    running.kill()
    running.wait()
    running.stderr.close()
    assert not (out / MODEL).exists()
    federate(config(**changes), out, Plan(resume=True))
    simulate(config(**changes), tmp_path / "plain")
    assert same(tmp_path / "plain", out)
    assert without_time(rounds(tmp_path / "plain")) == without_time(rounds(out))


def test_a_clients_memory_is_flowers_or_its_disk(tmp_path: Path):
    states = [{"w": torch.full((2,), float(number))} for number in range(4)]
    for folder in ("", str(tmp_path)):
        context = Context(0, 1, {}, RecordDict(), {})
        memory = ClientMemory("a", context, folder)
        assert memory.before(1) == {}
        memory.keep(1, states[1])
        assert torch.equal(memory.before(2)["w"], states[1]["w"])
        assert memory.before(1) == {}
        memory.keep(3, states[3])
        assert torch.equal(memory.before(9)["w"], states[3]["w"])
    restarted = ClientMemory("a", Context(0, 2, {}, RecordDict(), {}), str(tmp_path))
    assert torch.equal(restarted.before(4)["w"], states[3]["w"])
    assert torch.equal(restarted.before(3)["w"], states[1]["w"])


def test_a_client_that_raises_is_named_and_the_run_completes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    work = Federation.work

    def failing(self: Federation, order: Order, client_state: Any = None) -> Worked:
        if order.client == "client-01":
            raise TrainingError("the loss is nan")
        return work(self, order, client_state)

    monkeypatch.setattr(Federation, "work", failing)
    federate(config(), tmp_path)
    for record in rounds(tmp_path):
        assert record.extra["failed"] == {"client-01": "the loss is nan"}
        assert record.extra["clients"] == ["client-00", "client-02"]


@pytest.mark.parametrize("json_too", [[], ["--json"]], ids=["text", "json"])
def test_a_run_whose_clients_all_fail_ends_with_1_and_the_reason(
    json_too: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def failing(self: Federation, order: Order, client_state: Any = None) -> Worked:
        raise TrainingError("the loss is nan")

    monkeypatch.setattr(Federation, "work", failing)
    assert main(["federate", str(written(tmp_path)), "-o", str(tmp_path / "run"), *json_too]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no round of 2 gave a model" in last
    assert "client-00: the loss is nan; and 2 more" in last
    assert not (tmp_path / "run" / MODEL).exists()
    assert [record.extra["failed"]["client-02"] for record in rounds(tmp_path / "run")] == ["the loss is nan"] * 2


def test_a_client_that_never_answers_is_missing_and_the_run_completes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import time

    work = Federation.work

    def silent(self: Federation, order: Order, client_state: Any = None) -> Worked:
        if order.client == "client-02":
            time.sleep(60)
        return work(self, order, client_state)

    Federation(config(clients=4)).work(Order(client="client-00", round=1, state=Federation(config()).initial()))
    monkeypatch.setattr(Federation, "work", silent)
    federate(config(clients=4, rounds=1), tmp_path, Plan(timeout=5))
    (record,) = rounds(tmp_path)
    assert record.extra["missing"] == ["client-02"]
    assert record.extra["clients"] == ["client-00", "client-01", "client-03"]


def test_too_few_rows_end_the_run_before_a_client_is_asked(tmp_path: Path):
    with pytest.raises(DataError, match="rows are fewer than 10 for each of 40 networks"):
        federate(config(clients=40), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fewer_nodes_than_clients_are_the_first_ones(tmp_path: Path):
    federate(config(), tmp_path, Plan(nodes=2))
    assert [r.extra["missing"] for r in rounds(tmp_path)] == [["client-02"]] * 2
    with pytest.raises(UsageError, match="nodes is 4, but the config has 3 clients"):
        federate(config(), tmp_path / "other", Plan(nodes=4))
    with pytest.raises(UsageError, match="min_replies is 3, but there are 2 nodes"):
        federate(config(min_replies=3), tmp_path / "other", Plan(nodes=2))


def run_with(tmp_path: Path, node_configs: list[dict[str, Any]], **changes: Any) -> Record:
    settings = dataclasses.replace(Plan().settings(config(rounds=1, **changes), tmp_path), nodes=len(node_configs))
    flat = settings.to_flower()
    contexts = {k + 1: Context(0, k + 1, node, RecordDict(), flat) for k, node in enumerate(node_configs)}
    run_rounds(LocalGrid(client_app, contexts), settings)
    return rounds(tmp_path)[0]


def test_a_node_may_bring_its_own_data(tmp_path: Path):
    record = run_with(tmp_path, [{"partition-id": 0, "data": "digits"}, {"partition-id": 1}])
    part = len(Federation(config()).data_of("client-01"))
    assert record.extra["shares"] == pytest.approx({"client-00": 300 / (300 + part), "client-01": part / (300 + part)})


def test_nodes_that_do_not_say_who_they_are_are_told_how(tmp_path: Path):
    record = run_with(tmp_path, [{"partition-id": 0}, {"partition-id": 7}, {}])
    assert "config has 3 clients" in record.extra["failed"]["partition 7"]
    assert "--node-config 'partition-id=0'" in record.extra["failed"]["node 3"]
    assert record.extra["clients"] == ["client-00"]


def test_two_nodes_with_one_name_count_once(tmp_path: Path):
    record = run_with(tmp_path, [{"partition-id": 0}, {"partition-id": 0}, {"partition-id": 1}])
    assert record.extra["clients"] == ["client-00", "client-01"]
    assert "2 times; counted once" in record.extra["dropped"]["client-00"]


def test_a_port_in_use_ends_the_run_before_it_begins(tmp_path: Path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(FederatedError, match=f"port {port} .* cannot be used"):
            federate(config(), tmp_path, Plan(engine="superlink", port=port))


def test_an_authority_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match=f"there is no {tmp_path / 'ca.crt'}"):
        federate(config(), tmp_path / "run", Plan(engine="superlink", join="127.0.0.1:1", certificates=tmp_path))


def test_an_old_flower_is_told_apart_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("weldnet.federated.flower._deployment.version", lambda name: "1.39.2")
    with pytest.raises(FederatedError, match=r"Flower 1\.39\.2 is older than 1\.40"):
        federate(config(), tmp_path, Plan(engine="ray"))


# -- the command --------------------------------------------------------------------------------------


def test_the_command_runs_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, out = written(tmp_path), tmp_path / "run"
    assert main(["federate", str(path), "-o", str(out), "--json"]) == 0
    said = capsys.readouterr()
    shown = json.loads(said.out)
    assert [entry["round"] for entry in shown["rounds"]] == [1, 2]
    assert [(entry["clients"], entry["dropped"], entry["missing"]) for entry in shown["rounds"]] == [(3, 0, 0)] * 2
    assert all(entry["moved"] == rounds(out)[k].values["moved"] for k, entry in enumerate(shown["rounds"]))
    assert shown["rounds"][0]["extra"]["clients"] == ["client-00", "client-01", "client-02"]
    assert shown["engine"] == "local"
    assert Path(shown["model"]).exists()
    assert "round 2: 3 clients; accuracy" in said.err
    assert main(["federate", str(path), "-o", str(out)]) == 1
    assert "holds a run already" in capsys.readouterr().err
    assert main(["federate", str(path), "-o", str(out), "--resume"]) == 0
    assert "test accuracy" in capsys.readouterr().out


def test_the_command_prints_all_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "job.yaml"
    path.write_text("dataset: digits\nrule: gamf-joint\n")
    assert main(["federate", str(path), "--print-config"]) == 0
    found = FederatedConfig.make(yaml.safe_load(capsys.readouterr().out))
    assert found == FederatedConfig.read(path)
    assert not (tmp_path / "runs").exists()


def test_the_command_writes_an_app(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["federate", str(written(tmp_path)), "--write-app", str(tmp_path / "app")]) == 0
    assert "flwr run" in capsys.readouterr().err
    assert (tmp_path / "app" / "pyproject.toml").exists()


def test_without_flower_one_line_says_what_to_install(tmp_path: Path):
    script = (
        "import sys; sys.modules['flwr'] = None\nfrom weldnet.cli import main\n"
        f"sys.exit(main(['federate', {str(written(tmp_path))!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "Flower is not installed" in line
    assert "pip install 'weldnet[federated]'" in line
