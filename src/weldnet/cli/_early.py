"""What can be refused before torch is imported; the names here are those of the library, which a test compares."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from weldnet._shares import check_size, check_weights
from weldnet.cli._known import METHOD_OPTIONS
from weldnet.errors import CheckpointError, UsageError

__all__ = [
    "DATA_NAMES",
    "DATA_REPAIRS",
    "METHOD_NAMES",
    "REPAIR_NAMES",
    "REPORT_SUFFIXES",
    "ROUTE_NAMES",
    "WRITTEN_SUFFIXES",
    "a_type",
    "check_data",
    "check_method",
    "check_options",
    "check_repair",
    "check_route",
    "check_size",
    "check_weights",
    "close",
    "is_factory",
    "is_pretrained",
    "refuse_overwriting",
    "refuse_suffix",
    "refuse_unfinished",
    "require_files",
    "require_model",
]

METHOD_NAMES = tuple(METHOD_OPTIONS)
ROUTE_NAMES = ("auto", "dispatch", "export")
REPAIR_NAMES = ("auto", "none", "weights", "synthetic", "data", "refit", "calibrate")
#: Those that cannot do without unlabelled inputs.
DATA_REPAIRS = ("data", "refit", "calibrate")
WRITTEN_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
REPORT_SUFFIXES = (".html", ".md", ".csv", ".json")
DATA_NAMES = ("digits", "mnist", "cifar10", "cifar100", "tiny-imagenet")


def close(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` with the known words that are near, or nothing.

    >>> close("sgima", ["sigma", "tau"])
    " (did you mean 'sigma'?)"
    """
    near = difflib.get_close_matches(word, list(known), 3)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def a_type(value: object) -> str:
    """Name the type of a value with its article.

    >>> a_type(3), a_type("x")
    ('an int', 'a str')
    """
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def check_method(name: str) -> None:
    """Raise UsageError for a method that weldnet does not have."""
    if name not in (*METHOD_NAMES, "auto"):
        known = ", ".join(METHOD_NAMES)
        raise UsageError(f"unknown method {name!r}{close(name, METHOD_NAMES)}; weldnet has {known}, and auto")


def check_options(method: str, options: Iterable[str]) -> None:
    """Raise UsageError for an option that a method does not have; what ``auto`` has depends on the networks."""
    if method not in METHOD_OPTIONS:
        return
    known = METHOD_OPTIONS[method]
    for option in options:
        if option not in known:
            has = ", ".join(known) or "none"
            raise UsageError(f"{method} has no option {option!r}{close(option, known)}; its options: {has}")


def check_repair(repair: str, data: str | None) -> None:
    """Raise UsageError for a repair that weldnet does not have, or that needs data where there is none."""
    for name in repair.split("+"):
        if name not in REPAIR_NAMES:
            known = ", ".join(REPAIR_NAMES)
            raise UsageError(f"unknown repair {name!r}{close(name, REPAIR_NAMES)}; weldnet has {known}")
        if name in DATA_REPAIRS and data is None:
            raise UsageError(f"--repair {repair} needs unlabelled images; give --data, or --repair none")


def check_route(name: str) -> None:
    """Raise UsageError for a capture route that weldnet does not have."""
    if name not in ROUTE_NAMES:
        raise UsageError(f"unknown route {name!r}{close(name, ROUTE_NAMES)}; the routes are {', '.join(ROUTE_NAMES)}")


def require_files(files: Iterable[Path]) -> None:
    """Raise CheckpointError for the first checkpoint that is not there."""
    for file in files:
        if not os.path.lexists(file):
            raise CheckpointError(f"{str(file)!r}: no such file; check the path")


def is_factory(source: str) -> bool:
    """Say whether ``--data`` names the user's own factory, as in ``file.py:factory``."""
    return ":" in source and not Path(source).expanduser().is_dir()


def is_pretrained(folder: Path) -> bool:
    """Say whether a folder is one of the transformers library: its ``config.json`` names the kind of network."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and ("architectures" in config or "model_type" in config)


def require_model(model: str | None, example_input: str | None, files: Sequence[Path], command: str) -> None:
    """Raise UsageError if nothing says which network it is, or what it takes: folders of transformers do."""
    plain = [str(file) for file in files if not is_pretrained(file)]
    missing = ["--model SPEC"] if model is None and (plain or not files) else []
    brings_none = bool(plain) or not files if model is None else not is_pretrained(Path(model))
    if example_input is None and brings_none:
        missing.append("--input SPEC")
    if missing:
        why = f"{plain[0]!r} is no folder with a config.json that says it; " if plain else ""
        raise UsageError(f"{command} needs {' and '.join(missing)}; {why}see weldnet {command} --help")


def check_data(source: str) -> None:
    """Raise UsageError for ``--data`` that is no known name, no folder, no factory and cannot be on the hub."""
    named = source in DATA_NAMES or is_factory(source) or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source)
    if not named and not Path(source).expanduser().is_dir():
        raise UsageError(
            f"--data {source!r} is not a folder or a known dataset{close(source, DATA_NAMES)}; give one of "
            f"{', '.join(DATA_NAMES)}, a folder with test.parquet, a hub name org/name, or path/to/file.py:factory"
        )


def refuse_suffix(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raise UsageError for an output file whose suffix is not among the given ones."""
    if path.suffix not in suffixes:
        raise UsageError(f"{str(path)!r}: cannot write the extension {path.suffix!r}; use {', '.join(suffixes)}")


def refuse_unfinished(state: Path, resume: bool) -> None:
    """Raise UsageError if a training would begin anew over the state of one that was interrupted."""
    if state.exists() and not resume:
        raise UsageError(
            f"{str(state)!r} is an unfinished training; go on with it by --resume, or remove that file to start afresh"
        )


def refuse_overwriting(outputs: list[Path], inputs: list[Path]) -> None:
    """Raise UsageError if an output is an input, lies among an input's shards, or is another output."""
    taken = {os.path.realpath(path): path for path in inputs}
    homes = [path if path.is_dir() else path.parent for path in inputs if path.is_dir() or path.suffix == ".json"]
    for path in outputs:
        where = os.path.realpath(path)
        inside = path.exists() and any(path.resolve().parent == home.resolve() for home in homes)
        if where in taken or inside:
            raise UsageError(f"{str(path)!r} is read or written twice; choose another output path")
        taken[where] = path
