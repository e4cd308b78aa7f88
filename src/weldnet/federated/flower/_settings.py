"""A run's settings as Flower carries them: a flat table of words, numbers and truth values."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from weldnet.errors import ConfigError
from weldnet.federated import FederatedConfig

__all__ = ["RunSettings", "nested"]

_CONFIG = "federated."


@final
@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run is told, on the server and on every node.

    Args:
        config: the settings of the federation.
        out: the run's folder, on the server's machine.
        resume: whether to go on from what is there.
        nodes: how many nodes to wait for.
        patience: seconds to wait for them.
        timeout: seconds that clients have to answer; 0 for no limit.
        state: where clients keep what they need in their next round; empty to keep it in Flower's memory only.
    """

    config: FederatedConfig
    out: str = "run"
    resume: bool = False
    nodes: int = 0
    patience: float = 600.0
    timeout: float = 0.0
    state: str = ""

    def to_flower(self) -> dict[str, Any]:
        """Return the settings for ``[tool.flwr.app.config]``: the config's keys after ``federated.``.

        >>> settings = RunSettings(config=FederatedConfig(dataset="digits", model_options={"sizes": [64, 8, 10]}))
        >>> flat = settings.to_flower()
        >>> flat["federated.partition.alpha"], flat["federated.model_options.sizes"]
        (0.5, '[64, 8, 10]')
        >>> RunSettings.from_flower(flat) == settings
        True
        """
        own = {key: getattr(self, key) for key in _OWN}
        # None is the default of every key of the config that may be None; inside of options it is a value like others.
        said = {key: value for key, value in self.config.model_dump().items() if value is not None}
        return own | _flat(said, _CONFIG)

    @staticmethod
    def from_flower(flat: Mapping[str, Any]) -> RunSettings:
        """Read what :meth:`to_flower` wrote, or a person in an app's ``pyproject.toml``.

        Raises:
            ConfigError: an unknown key or a value that means nothing.
        """
        own = {key: value for key, value in flat.items() if not key.startswith(_CONFIG)}
        unknown = sorted(own.keys() - _OWN.keys())
        if unknown:
            raise ConfigError(f"run config: unknown key {unknown[0]!r}; the keys are federated.* and {', '.join(_OWN)}")
        for key, value in own.items():
            own[key] = _typed(key, value)
        config = nested({key.removeprefix(_CONFIG): v for key, v in flat.items() if key.startswith(_CONFIG)})
        return RunSettings(config=FederatedConfig.make(config, "run config"), **own)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.out)


_OWN: dict[str, type] = {
    "out": str,
    "resume": bool,
    "nodes": int,
    "patience": float,
    "timeout": float,
    "state": str,
}


def _typed(key: str, value: Any) -> Any:
    kind = _OWN[key]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"run config: {key} is {value!r}; give a {kind.__name__}")
    return value


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Flatten; what Flower has no type for, or would read as another one, is written as JSON."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value and all(_plain(name) for name in value):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float) or (isinstance(value, str) and not _is_json(value)):
            found[prefix + key] = value
        else:
            found[prefix + key] = json.dumps(value)
    return found


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Undo the flattening.

    Raises:
        ConfigError: a value that begins as JSON does, and is none.

    >>> nested({"a.b": 1, "a.c": "[1, 2]", "d": "x", "e": "null"})
    {'a': {'b': 1, 'c': [1, 2]}, 'd': 'x', 'e': None}
    """
    found: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        place = found
        for part in path:
            place = place.setdefault(part, {})
        try:
            place[last] = json.loads(value) if isinstance(value, str) and _is_json(value) else value
        except ValueError as error:
            raise ConfigError(f"run config: {key} is {value!r}, which is no JSON: {error}") from error
    return found


def _is_json(word: str) -> bool:
    """Whether a word stands for another value: a list, a mapping, a word in quotes, or null."""
    return word == "null" or word.startswith(("[", "{", '"'))


def _plain(key: object) -> bool:
    """Whether a key of a mapping may be part of one of Flower's, in which dots have a meaning."""
    return isinstance(key, str) and re.fullmatch(r"[A-Za-z0-9_-]+", key) is not None
