"""Studies on a Ray cluster: the same records, also when a process is killed."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml

from weldnet import experiments, records
from weldnet.cli import main
from weldnet.errors import UsageError
from weldnet.experiments import Cell, Context, Observer, Outcome, RayCluster, Watch

CONFIG: dict[str, Any] = {
    "table": "tiny",
    "title": "Two small networks",
    "protocol": {
        "dataset": "digits",
        "rows": 200,
        "architectures": {"mlp": {"model": "mlp", "options": {"sizes": [64, 8, 10]}}},
        "recipe": {"epochs": 1, "lr": 0.01},
        "partitions": {"homogeneous": {}},
        "networks": {2: 1},
        "methods": ["individual", "naive", "gamf"],
    },
    "scales": {"smoke": {}},
}
#: Ends the process that unpickles it, the first time; the second time it is what it holds.
_BOMB = (
    "(pathlib.Path(marker).exists() or (pathlib.Path(marker).touch(), os.kill(os.getpid(), signal.SIGKILL))) and work"
)


class Bomb:
    def __init__(self, work: Any, marker: Path) -> None:
        self.work, self.marker = work, str(marker)

    def __reduce__(self) -> Any:
        modules = ("os", "pathlib", "signal")
        names = {"marker": self.marker, "work": self.work}
        source = f"[{', '.join(f'{m} := __import__({m!r})' for m in modules)}] and {_BOMB}"
        return eval, (source, names)


@dataclasses.dataclass(frozen=True)
class Bombed:
    """Puts a bomb into one cell."""

    executor: RayCluster
    marker: Path

    def map(self, cells: Sequence[Cell], context: Context, watch: Watch) -> Generator[Outcome]:
        worst = max(range(len(cells)), key=lambda i: "gamf" in cells[i].name)
        bombed = dataclasses.replace(cells[worst], work=Bomb(cells[worst].work, self.marker))
        return self.executor.map([*cells[:worst], bombed, *cells[worst + 1 :]], context, watch)


class Heard(Observer):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def measured(folder: Path) -> dict[tuple[str, str], Any]:
    """What must not depend on how a run went."""
    found: dict[tuple[str, str], Any] = {}
    for record in records.read(folder):
        values = {k: v for k, v in record.values.items() if k not in ("seconds", "memory")}
        found[record.kind, record.key] = {
            **json.loads(record.to_json()), "time": None, "where": None, "values": values
        }  # fmt: skip
    return found


def test_a_cell_whose_process_is_killed_is_tried_again_and_the_records_are_those_of_one_process(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray's workers yield to everybody else: not in a test
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    study = experiments.resolve(str(tmp_path / "tiny.yaml"), "smoke")
    assert not experiments.run_study(study, tmp_path / "whole").failed
    heard = Heard()
    executor = Bombed(RayCluster(workers=2), tmp_path / "marker")
    done = experiments.run_study(study, tmp_path / "run", executor=executor, observer=heard)
    assert not done.failed
    assert sum("trying once more" in text for text in heard.said) == 1
    assert (tmp_path / "marker").exists()
    assert measured(tmp_path / "run") == measured(tmp_path / "whole")
    assert not ray.is_initialized()


def test_executors_that_cannot_be_meant_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words, said in (
        (["--executor", "slurm"], "unknown"),
        (["--address", "auto"], "--executor ray"),
    ):
        assert main(["reproduce", "mnist", "--scale", "smoke", *words]) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_cell_for_a_gpu_asks_for_one(monkeypatch):
    """By what Ray is told: there is no GPU here, and Ray hides those that nobody asks for."""
    ray, context = MagicMock(), MagicMock(device="cuda", threads=2)
    monkeypatch.setitem(sys.modules, "ray", ray)
    cells = [Cell(f"cell {number}", (), None) for number in range(4)]
    ray.cluster_resources.return_value = {"CPU": 8.0, "GPU": 3.0}
    ray.get.return_value = ([], [], "", False)
    ray.remote.return_value.return_value.remote.side_effect = lambda cell, plain: cell.name
    in_work: list[int] = []
    ray.wait.side_effect = lambda refs, num_returns: (in_work.append(len(refs)), (refs[:1], []))[1]
    assert len(list(RayCluster(address="auto").map(cells, context, Watch()))) == 4
    asked = ray.remote.call_args.kwargs
    assert (asked["num_cpus"], asked["num_gpus"]) == (2, 1)
    assert max(in_work) == 3
    ray.cluster_resources.return_value = {"CPU": 8.0}
    with pytest.raises(UsageError, match="Ray has no GPU"):
        list(RayCluster(address="auto").map(cells, context, Watch()))
    ray.shutdown.assert_called()
