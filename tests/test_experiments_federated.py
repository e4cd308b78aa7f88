"""Federated studies: their cells, what they record, and that they go on where they stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from weldnet import experiments, records
from weldnet.errors import ConfigError, TrainingError
from weldnet.experiments import Study

CONFIG: dict[str, Any] = {
    "table": "tiny",
    "title": "A small federation",
    "kind": "federated",
    "paper": [{"source": "somewhere", "rows": [{"networks": 2, "method": "gamf", "accuracy": 0.5}]}],
    "protocol": {
        "base": {
            "dataset": "digits",
            "train_limit": 200,
            "model": "mlp",
            "model_options": {"sizes": [64, 8, 10]},
            "clients": 2,
            "rounds": 2,
            "local": {"epochs": 1, "batch_size": 16},
        },
        "settings": {
            "own": {"config": {"initialisation": "own"}, "methods": {"gamf": {"local": {"epochs": 2}}}},
            "common": {},
        },
        "methods": {"fedavg": {"rule": "fedavg"}, "gamf": {"rule": "gamf"}},
        "at": [1],
        "seeds": [0, 1],
    },
    "scales": {"smoke": {}},
}


def study(folder: Path, **protocol: Any) -> Study:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "protocol": {**CONFIG["protocol"], **protocol}}))
    return experiments.resolve(str(path))


def test_a_cell_for_every_setting_method_and_seed(tmp_path: Path) -> None:
    cells = experiments.plan(study(tmp_path))
    assert len(cells) == 8
    assert len({key for cell in cells for key in cell.keys}) == 16
    assert {cell.makes[0].words["stage"] for cell in cells} == {"round 1"}
    assert {cell.makes[0].words["partition"] for cell in cells} == {
        "dirichlet 0.5",
        "dirichlet 0.5, own initialisation",
    }
    epochs = {cell.name: cell.work.config.local.epochs for cell in cells}
    assert epochs["own/gamf/seed0"] == 2
    assert epochs["common/gamf/seed0"] == 1


def test_results_are_the_rounds_that_were_asked_for(tmp_path: Path) -> None:
    small = study(tmp_path, seeds=[0], settings={"own": {"config": {"initialisation": "own"}}})
    done = experiments.run_study(small, tmp_path / "run")
    assert not done.failed
    found = records.read(tmp_path / "run")
    results = found.of("result", method="gamf")
    assert [r.cell["round"] for r in results] == [1, 2]
    assert all(r.cell["networks"] == 2 and r.cell["initialisation"] == "own" for r in results)
    rounds = found.of("round", method="gamf")
    assert [r.values["accuracy"] for r in rounds] == [r.values["accuracy"] for r in results]
    assert len(list((tmp_path / "run" / "models").glob("*.safetensors"))) == 2
    again = experiments.run_study(small, tmp_path / "run", resume=True)
    assert again.worked == 0


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weldnet.federated import Server

    small = study(tmp_path, seeds=[0], settings={"common": {}}, methods={"gamf": {"rule": "gamf"}})
    experiments.run_study(small, tmp_path / "whole")
    receive = Server.receive

    def killed(self: Server, *args: Any, **options: Any) -> Any:
        if self.round == 1:
            raise KeyboardInterrupt
        return receive(self, *args, **options)

    monkeypatch.setattr(Server, "receive", killed)
    with pytest.raises(KeyboardInterrupt):
        experiments.run_study(small, tmp_path / "cut")
    monkeypatch.setattr(Server, "receive", receive)
    experiments.run_study(small, tmp_path / "cut", resume=True)
    whole, cut = (records.read(tmp_path / name).of("result") for name in ("whole", "cut"))
    assert [(r.key, r.values["accuracy"]) for r in whole] == [(r.key, r.values["accuracy"]) for r in cut]


def test_a_run_whose_clients_all_failed_is_a_record_with_its_reason_and_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weldnet.federated import Federation

    def failing(*args: Any) -> Any:
        raise TrainingError("the loss became nan")

    small = study(tmp_path, seeds=[0], settings={"common": {}}, methods={"gamf": {"rule": "gamf"}})
    with monkeypatch.context() as patch:
        patch.setattr(Federation, "work", failing)
        assert experiments.run_study(small, tmp_path / "run").failed
    error = next(r.extra["error"] for r in records.read(tmp_path / "run") if "error" in r.extra)
    assert "no round of 2 gave a model" in error
    assert "client-00: the loss became nan" in error
    assert not experiments.run_study(small, tmp_path / "run", resume=True).failed
    experiments.run_study(small, tmp_path / "plain")
    again, plain = (records.read(tmp_path / name).of("result") for name in ("run", "plain"))
    found = {r.key: r.values["accuracy"] for r in again if "error" not in r.extra}
    assert found == {r.key: r.values["accuracy"] for r in plain}


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        ({"methods": {"gamf": {"rule": "gamff"}}}, "cell common/gamf/seed0.*unknown rule 'gamff'"),
        ({"methods": {"fedavg": {}}}, "changes the method 'gamf'"),
        ({"settings": {}}, "settings"),
        ({"base": {"dataset": "digits", "rouds": 3}}, "did you mean 'rounds'"),
    ],
)
def test_protocols_that_mean_nothing_are_refused(protocol: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        experiments.plan(study(tmp_path, **protocol))


@pytest.mark.parametrize("table", ["federated-talk", "federated-matching"])
@pytest.mark.parametrize("scale", experiments.SCALES)
def test_our_tables_can_be_planned(table: str, scale: str) -> None:
    assert experiments.plan(experiments.resolve(table, scale))
