"""The settings of ``fuse``: a YAML file, overridden by the command line, checked once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from weldnet.cli._common import parse_outputs
from weldnet.cli._early import a_type
from weldnet.errors import ConfigError, UsageError

__all__ = ["FuseConfig", "resolve"]


def _numbers(value: object) -> object:
    """Read ``.5,.5`` as a list of numbers."""
    return [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _names(value: object) -> object:
    """Read ``logits,aux`` as a list of names."""
    return parse_outputs(value) if isinstance(value, str) else value


class FuseConfig(BaseModel):
    """Everything that ``weldnet fuse`` can be told; the keys of a config file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    networks: list[Path] = []
    output: Path | None = None
    model: str | list[str] | None = None
    input: str | None = None
    outputs: Annotated[list[str] | None, BeforeValidator(_names)] = None
    route: str = "auto"
    method: str = "gamf"
    options: dict[str, Any] = {}
    weights: Annotated[list[float] | dict[str, float] | None, BeforeValidator(_numbers)] = None
    repair: str = "auto"
    data: str | None = None
    samples: Annotated[int, Field(ge=1)] = 512
    size: Annotated[float, Field(ge=1)] = 1.0
    into: str | None = None
    report: Path | None = None
    alignment_out: Path | None = None
    check: bool = True
    seed: Annotated[int, Field(ge=0)] = 0
    device: str | None = None
    stream: bool = False
    shard_size: str | None = None

    @property
    def models(self) -> list[str]:
        """The model specs: none, one for all networks, or one for each."""
        return [self.model] if isinstance(self.model, str) else self.model or []

    def to_yaml(self) -> str:
        """Return the settings as a config file."""
        return yaml.safe_dump(_writable(self.model_dump()), sort_keys=False)


def _writable(value: Any) -> Any:
    """Replace what YAML has no word for; unlike JSON it has one for infinity."""
    if isinstance(value, Mapping):
        return {key: _writable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def resolve(file: Path | None, given: Mapping[str, Any]) -> FuseConfig:
    """Join a config file and the command line, which wins.

    Args:
        file: the config file, or None.
        given: values by key; None where the command line says nothing.

    Raises:
        ConfigError: the file cannot be read, has an unknown key, or a value that means nothing.
        UsageError: a value on the command line means nothing.
    """
    said = {key: value for key, value in given.items() if value not in (None, [], {})}
    written = _read(file) if file is not None else {}
    if file is not None:
        _validate(written, f"{str(file)!r}: ", ConfigError)
    said["options"] = {**(written.get("options") or {}), **said.get("options", {})}
    return _validate({**written, **said}, "--", UsageError)


def _read(file: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"config {str(file)!r} cannot be read: {why}; give a YAML file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config {str(file)!r} is not YAML: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"config {str(file)!r} holds {a_type(loaded)}; write 'key: value' lines")
    return {str(key).replace("-", "_"): value for key, value in loaded.items()}


def _validate(values: Mapping[str, Any], prefix: str, kind: type[UsageError]) -> FuseConfig:
    try:
        return FuseConfig(**values)
    except ValidationError as error:
        raise kind(prefix + _reason(error.errors()[0])) from error


def _reason(fault: Any) -> str:
    where = str(fault["loc"][0])
    if where == "weights":
        return f"weights: {fault['input']!r} is not a number; give one share for each network, which sum to 1: .5,.5"
    if fault["type"] != "extra_forbidden":
        return f"{where}: {fault['input']!r} is no good: {fault['msg'].lower()}"
    known = list(FuseConfig.model_fields)
    close = difflib.get_close_matches(where, known, 2)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"the keys are {', '.join(known)}"
    return f"unknown key {where!r}; {hint}"
