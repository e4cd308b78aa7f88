"""Settings of a run as Flower carries them, app folders, and plans that mean nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from federations import config, rounds
from weldnet.errors import ConfigError, FederatedError, UsageError
from weldnet.federated.flower import Plan, RunSettings, federate, write_app
from weldnet.federated.flower._engines import _simulation
from weldnet.models import mlp


def test_settings_come_back_from_flower_as_they_were():
    settings = RunSettings(
        config=config(
            rule={"name": "gamf", "weighting": "uniform"}, algorithm={"name": "moon", "mu": 5.0}, participation=0.5
        ),
        out="/tmp/a b",
        resume=True,
        nodes=3,
        timeout=2.5,
    )
    flat = settings.to_flower()
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())
    assert RunSettings.from_flower(flat) == settings
    with pytest.raises(ConfigError, match="unknown key 'outt'"):
        RunSettings.from_flower({**flat, "outt": "x"})
    with pytest.raises(ConfigError, match="nodes is 'two'; give a int"):
        RunSettings.from_flower({**flat, "nodes": "two"})
    with pytest.raises(ConfigError, match="run config: unknown key 'rouns'; did you mean 'rounds'"):
        RunSettings.from_flower({**flat, "federated.rouns": 3})


def options_model(sizes: tuple[int, ...], tag: str, scale: float | None = 0.5, **more: Any) -> torch.nn.Module:
    """A model that says what it was given."""
    assert tag == "[not json"
    assert scale is None
    assert more == {"word": "null", "quoted": '"', "empty": {}, "nested": {"deep": None}, "odd": {"a.b": [1, None]}}
    return mlp(sizes)


def test_options_of_every_kind_reach_the_clients(tmp_path: Path):
    """None above all, for which Flower has no type."""
    options = {"sizes": [64, 10, 10], "tag": "[not json", "scale": None, "word": "null", "quoted": '"', "empty": {}}
    options |= {"nested": {"deep": None}, "odd": {"a.b": [1, None]}}
    settings = config(model=f"{__name__}:options_model", model_options=options, rounds=1)
    flat = Plan().settings(settings, tmp_path).to_flower()
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())
    assert RunSettings.from_flower(flat).config == settings
    folder = write_app(tmp_path / "app", Plan().settings(settings, tmp_path / "run"))
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert RunSettings.from_flower(flattened(project["tool"]["flwr"]["app"]["config"])).config == settings
    federate(settings, tmp_path / "local")
    assert rounds(tmp_path / "local")[0].values["replies"] == 3
    with pytest.raises(ConfigError, match="run config: rule is '\\[x', which is no JSON"):
        RunSettings.from_flower({**flat, "federated.rule": "[x"})


def test_an_app_folder_is_what_flower_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = Plan(nodes=2).settings(config(rule={"name": "gamf", "sigma": 2.0}), tmp_path / "run")
    folder = write_app(tmp_path / "app", settings)
    write_app(folder, settings)
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    flat = flattened(project["tool"]["flwr"]["app"]["config"])
    assert RunSettings.from_flower(flat) == settings
    monkeypatch.syspath_prepend(str(folder))
    import federation  # pyright: ignore[reportMissingImports]

    assert isinstance(federation.server_app, ServerApp)
    assert isinstance(federation.client_app, ClientApp)
    done = subprocess.run(
        [Path(sys.executable).parent / "flwr", "build", "--app", folder],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"FLWR_HOME": str(tmp_path / "home"), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.glob("*.fab"))
    (folder / "mine.py").touch()
    with pytest.raises(FederatedError, match=r"holds 'mine\.py'"):
        write_app(folder, settings)


def flattened(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "cloud"}, "unknown engine 'cloud'; give local, ray, superlink"),
        ({"port": 9000}, "the engine local has no port; give --engine superlink"),
        ({"engine": "ray", "join": "a:1"}, "the engine ray has no join"),
        ({"engine": "superlink", "join": "a:1", "port": 9000}, "leave --port and --keys out"),
        ({"nodes": 0}, "nodes is 0; give 1 or more"),
        ({"timeout": 0.0}, "timeout is 0 seconds; give more than 0"),
        ({"patience": -1.0}, "patience is -1 seconds; give 0 or more"),
    ],
    ids=["engine", "port", "join", "both", "nodes", "timeout", "patience"],
)
def test_plans_that_mean_nothing_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        Plan(**options)


def test_clients_that_train_on_gpus_share_them(monkeypatch):
    """Ray hides GPUs from clients that have no share in them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert "client-resources-num-gpus" not in _simulation(5, "cpu")
    many = _simulation(50, "cuda")
    assert (many["init-args-num-gpus"], many["client-resources-num-gpus"]) == (2, 0.125)
    assert 16 * many["client-resources-num-gpus"] <= 2
    assert _simulation(1, "cuda:0")["client-resources-num-gpus"] == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for cores in (3, 16, 128, 4096):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: set(range(n)), raising=False)
        share = _simulation(5000, "cuda")["client-resources-num-gpus"]
        assert share > 0
        assert int(1 / share) >= cores  # as Flower counts the clients that have room
