"""What ``--model`` says, and what is wrong with it that can be seen without torch and without running it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from weldnet.cli._common import parse_scalar
from weldnet.cli._early import close
from weldnet.cli._input import check_input
from weldnet.cli._known import MODEL_OPTIONS
from weldnet.errors import UsageError

__all__ = ["check_factory", "check_model", "check_specs", "forms", "search_first", "split_spec"]

_FACTORIES = "pkg.mod:factory or path/to/file.py:factory"
_MODELS = "pkg.mod:factory, path/to/file.py:factory, a folder with a config.json, or a name such as vgg11?width=0.25"


def split_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Split a model spec into what builds it and the options.

    >>> split_spec("vgg11?width=0.25&bias=false")
    ('vgg11', {'width': 0.25, 'bias': False})
    """
    head, _, tail = spec.partition("?")
    return head, {key: parse_scalar(value) for key, value in parse_qsl(tail, keep_blank_values=True)}


def check_specs(model: str | None, example_input: str | None = None, *, option: str = "--model") -> None:
    """Raise UsageError for what ``--model`` and ``--input`` say, as far as it shows without torch.

    Args:
        model: a model spec.
        example_input: what ``--input`` says.
        option: the option that gave the model spec, for messages.
    """
    if model is not None:
        check_model(model, option=option)
    if example_input is not None:
        check_input(example_input)


def check_model(spec: str, *, option: str = "--model") -> None:
    """Raise UsageError for a model spec with an unknown name, option, file or module; nothing of the user's is run.

    Args:
        spec: as ``--model`` takes it.
        option: the option that gave the spec, for messages.
    """
    head, options = split_spec(spec)
    if Path(head).is_dir():
        if options:
            raise UsageError(f"{option} {head!r} is a folder and takes no options; change its config.json instead")
    elif ":" in head:
        check_factory(head, option)
    elif head.endswith(".py"):
        raise UsageError(f"{option} {head!r} is a file; name the factory in it, as in {head}:make")
    elif head not in MODEL_OPTIONS:
        known = ", ".join(MODEL_OPTIONS)
        raise UsageError(f"unknown model {head!r}{close(head, MODEL_OPTIONS)}; give {_MODELS} (of {known})")
    else:
        _check_options(head, options)


def _check_options(name: str, options: dict[str, Any]) -> None:
    known = MODEL_OPTIONS[name]
    for key in options:
        if key not in known:
            raise UsageError(
                f"model {name!r} has no option {key!r}{close(key, known)}; its options: {', '.join(known)}"
            )


def check_factory(spec: str, option: str) -> None:
    """Raise UsageError for ``pkg.mod:factory`` or ``file.py:factory`` whose module or file is not there.

    Args:
        spec: module or file, a colon, and a function or class in it.
        option: the option that gave the spec, for messages.
    """
    where, _, attribute = spec.rpartition(":")
    if not where.strip(".") or not attribute:
        raise UsageError(f"{option} {spec!r} has nothing on one side of its ':'; give {forms(option)}")
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise UsageError(f"there is no file {where!r}; {option} takes {forms(option)}")
        return
    if where.startswith("."):
        raise UsageError(f"{option} {spec!r} begins with a dot, which no module's name does; give {forms(option)}")
    search_first(Path.cwd())
    top = where.partition(".")[0]
    if not _is_module(top):
        raise UsageError(f"there is no module {top!r} here or on the Python path; install it, or give {forms(option)}")


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # it does not say where it comes from, as __main__; importing it shows
        return True


def forms(option: str) -> str:
    """Say what an option takes that names a factory."""
    return _MODELS if option in ("--model", "--into") else _FACTORIES


def search_first(folder: Path) -> None:
    """Let modules be imported from a folder."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
