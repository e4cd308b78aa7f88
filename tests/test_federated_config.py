"""The settings of federated runs: what is refused, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from federations import config
from weldnet.errors import ConfigError
from weldnet.federated import FederatedConfig, Federation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rouds": 3}, "did you mean 'rounds'"),
        ({"local": {"epoch": 3}}, "did you mean 'epochs'"),
        ({"rounds": 0}, "rounds: 0 is no good"),
        ({"rounds": "3"}, "rounds: '3' is no good"),
        ({"rule": "gamff"}, "unknown rule 'gamff'"),
        ({"algorithm": {"name": "moon", "nu": 1}}, "no option 'nu'"),
        ({"server_optimiser": "adam"}, "unknown server optimiser 'adam'"),
        ({"align_at": "client", "rule": "fedavg"}, "align_at"),
        ({"align_at": "client", "rule": "gamf-joint"}, "align_at"),
        ({"align_at": "client", "server_optimiser": "fedexp"}, "fedexp needs them one by one"),
        ({"align_at": "client", "repair": "refit", "server_rows": 9}, "repair refit needs them one by one"),
        ({"rule": "activation_matching"}, "server_rows"),
        ({"min_replies": 4}, "min_replies is 4"),
        ({"repair": "refit"}, "server_rows"),
        ({"own_model_options": [{}]}, "initialisation is 'common'"),
        ({"own_model_options": [{}], "initialisation": "own"}, "needs equal widths"),
        ({"repair": "refitt"}, "unknown repair 'refitt'"),
        ({"partition": {"scheme": "random"}}, "partition.scheme"),
        ({"participation": 0.0}, "participation"),
    ],
)
def test_configs_that_mean_nothing_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config(**changes)
    assert "\n" not in str(caught.value)


def test_a_config_comes_from_a_file_and_goes_to_one(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(config(rule={"name": "gamf", "weighting": "uniform"}).to_yaml())
    assert FederatedConfig.read(path) == config(rule={"name": "gamf", "weighting": "uniform"})
    path.write_text("clients: 3")
    with pytest.raises(ConfigError, match="dataset is missing"):
        FederatedConfig.read(path)
    path.write_text("- 1")
    with pytest.raises(ConfigError, match="no settings"):
        FederatedConfig.read(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        FederatedConfig.read(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "mlpp"}, "unknown model 'mlpp'"),
        ({"model": "weldnet.models:nothing"}, "cannot be imported"),
        ({"model_options": {"depth": 3}}, "cannot be built"),
    ],
)
def test_models_that_do_not_exist_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Federation(config(**changes))


def test_models_can_be_imported() -> None:
    federation = Federation(config(model="weldnet.models:mlp"))
    assert set(federation.initial()) == {"layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"}
