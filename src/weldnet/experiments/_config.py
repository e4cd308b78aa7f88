"""Tables as data: what a study trains, fuses and quotes, in YAML; unknown keys are errors."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, final

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from weldnet.errors import ConfigError, UsageError
from weldnet.experiments._kinds import KINDS

__all__ = ["SCALES", "Paper", "Published", "Scale", "Study", "Table", "load_table", "resolve", "table_names"]

SCALES = ("smoke", "cpu", "gpu")
"""Minutes on two cores; under two hours on two cores; the size of the papers."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Published(_Strict):
    """One published number, or several of one cell; ``None`` where the paper has none."""

    dataset: str | None = None
    partition: str | None = None
    architecture: str | None = None
    networks: int | None = None
    method: str | None = None
    repair: str | None = None
    stage: str | None = None
    size: float | None = None
    accuracy: float | None = None
    loss: float | None = None
    barrier: float | None = None
    note: str = ""

    @property
    def words(self) -> dict[str, Any]:
        """What the number is about."""
        given = self.model_dump(exclude={"accuracy", "loss", "barrier", "note"})
        return {word: value for word, value in given.items() if value is not None}

    @property
    def values(self) -> dict[str, float]:
        """The numbers."""
        given = self.model_dump(include={"accuracy", "loss", "barrier"})
        return {name: value for name, value in given.items() if value is not None}


class Paper(_Strict):
    """Numbers of one source; ``cell`` holds the words that all its rows share."""

    source: str
    cell: Published = Published()
    rows: list[Published] = []


class Scale(_Strict):
    """What one scale changes: ``protocol`` is laid over the table's, key by key; ``null`` takes a key away."""

    about: str = ""
    protocol: dict[str, Any] = {}


class Table(_Strict):
    """A file of ``tables/``, or a user's own."""

    table: str
    title: str
    kind: str = "fusion"
    about: str = ""
    notes: list[str] = []
    paper: list[Paper] = []
    protocol: dict[str, Any]
    scales: dict[str, Scale]


@final
@dataclass(frozen=True)
class Study:
    """A table at a scale.

    Args:
        table: what the file says.
        scale: which of its scales.
        protocol: the settings at that scale; its type belongs to the table's kind.
        file: where it was read, for messages.
    """

    table: Table
    scale: str
    protocol: Any
    file: str

    @property
    def kind(self) -> str:
        """Which cells it has."""
        return self.table.kind

    def to_yaml(self) -> str:
        """Return a config that gives this very study again."""
        plain = self.table.model_dump(mode="json", exclude={"protocol", "scales"}, exclude_defaults=True)
        plain["kind"] = self.kind
        plain["protocol"] = self.protocol.model_dump(mode="json")
        plain["scales"] = {self.scale: {"about": self.table.scales[self.scale].about}}
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110)


def table_names() -> list[str]:
    """Return the names of weldnet's own tables, in their order.

    >>> "mnist" in table_names()
    True
    """
    return sorted(entry.name.removesuffix(".yaml") for entry in _home().iterdir() if entry.name.endswith(".yaml"))


def load_table(source: str) -> Table:
    """Read a table by name, or a config file by its path (which ends in ``.yaml`` or ``.yml``).

    Raises:
        UsageError: there is no such table.
        ConfigError: the file cannot be read, has an unknown key, or a value that means nothing; every scale is checked.
    """
    file, text = _read(source)
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"config {file!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"config {file!r} holds {type(loaded).__name__}; write 'key: value' lines")
    table = _validated(Table, loaded, file, "")
    if table.kind not in KINDS:
        raise ConfigError(f"{file}: kind: unknown kind {table.kind!r}{_near(table.kind, KINDS)}; give {_listed(KINDS)}")
    if not table.scales:
        raise ConfigError(f"{file}: scales: there are none; give at least one, such as smoke: {{}}")
    for scale in table.scales:
        if scale not in SCALES:
            raise ConfigError(f"{file}: scales: unknown scale {scale!r}{_near(scale, SCALES)}; give {_listed(SCALES)}")
        _protocol(table, scale, file)
    return table


def resolve(source: str, scale: str | None = None) -> Study:
    """Read a table and choose one of its scales.

    Args:
        source: as for :func:`load_table`.
        scale: one of :data:`SCALES`; may be left out where the file has a single one.

    Raises:
        UsageError: there is no such table or scale.
        ConfigError: as :func:`load_table`.

    >>> resolve("mnist", "smoke").protocol.dataset
    'digits'
    """
    table = load_table(source)
    if scale is None and len(table.scales) == 1:
        scale = next(iter(table.scales))
    if scale is None:
        raise UsageError(f"table {table.table!r} has the scales {_listed(table.scales)}; choose one with --scale")
    if scale not in table.scales:
        hint = _near(scale, table.scales)
        raise UsageError(f"unknown scale {scale!r}{hint}; table {table.table!r} has {_listed(table.scales)}")
    file, _ = _read(source)
    return Study(table, scale, _protocol(table, scale, file), file)


def overlay(base: Mapping[Any, Any], change: Mapping[Any, Any]) -> dict[Any, Any]:
    """Lay one mapping over another, key by key; None takes a key away, everything but mappings is replaced.

    >>> overlay({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 5, "c": None}})
    {'a': {'b': 5}, 'd': 3}
    """
    found = dict(base)
    for key, value in change.items():
        old = found.get(key)
        if value is None:
            found.pop(key, None)
        elif isinstance(value, Mapping):
            found[key] = overlay(old if isinstance(old, Mapping) else {}, value)
        else:
            found[key] = value
    return found


def _protocol(table: Table, scale: str, file: str) -> Any:
    values = overlay(table.protocol, table.scales[scale].protocol)
    return _validated(KINDS[table.kind].protocol(), values, file, f"protocol at scale {scale}")


def _home() -> Any:
    return resources.files("weldnet.experiments") / "tables"


def _read(source: str) -> tuple[str, str]:
    """Return the name of a table's file, and what is in it."""
    if Path(source).suffix in (".yaml", ".yml"):
        try:
            return source, Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"config {source!r} cannot be read: {why}; give a YAML file") from error
    names = table_names()
    if source not in names:
        raise UsageError(
            f"unknown table {source!r}{_near(source, names)}; weldnet has {_listed(names)}, or give a file CONFIG.yaml"
        )
    return f"{source}.yaml", (_home() / f"{source}.yaml").read_text(encoding="utf-8")


def _validated(model: type[BaseModel], values: Mapping[str, Any], file: str, where: str) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{file}: {_reason(model, error.errors()[0], where)}") from error


def _reason(model: type[BaseModel], fault: Any, where: str) -> str:
    path = [str(step) for step in fault["loc"]]
    if fault["type"] == "extra_forbidden":
        place = ".".join([where, *path[:-1]] if where else path[:-1]) or "the file"
        known = _keys(model, fault["loc"][:-1])
        hint = _near(path[-1], known) or (f"; the keys are {_listed(known)}" if known else "")
        return f"unknown key {path[-1]!r} in {place}{hint}"
    place = ".".join([where, *path] if where else path)
    if fault["type"] == "missing":
        return f"{place} is missing; give it a value"
    reason = str(fault["msg"]).removeprefix("Value error, ")
    return f"{place}: {reason}" + ("" if fault["type"] == "value_error" else f" (it is {fault['input']!r})")


def _keys(model: Any, path: tuple[Any, ...]) -> list[str]:
    """Return the keys that a mapping at a path of a model may have; none where that is not known."""
    found: list[Any] = [model]
    for step in path:
        nested: list[Any] = []
        for kind in found:
            fields = getattr(kind, "model_fields", {})
            nested += _inside(fields[step].annotation) if step in fields else []
        found = nested or found
    return [key for kind in found for key in getattr(kind, "model_fields", {})]


def _inside(annotation: Any) -> list[Any]:
    """Return the models in an annotation such as ``dict[str, Model]`` or ``Model | None``."""
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _inside(part)]


def _near(word: str, known: Any) -> str:
    near = difflib.get_close_matches(str(word), [str(name) for name in known], 3)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def _listed(words: Any) -> str:
    return ", ".join(map(str, words))
