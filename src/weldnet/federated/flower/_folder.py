"""A plain Flower app: a folder that ``flwr run`` takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weldnet._version import __version__
from weldnet.errors import FederatedError
from weldnet.federated.flower._flwr import as_toml
from weldnet.federated.flower._settings import RunSettings

__all__ = ["write_app"]

_MODULE = "federation"


def write_app(folder: str | os.PathLike[str], settings: RunSettings) -> Path:
    """Write an app folder with a run's settings in its ``pyproject.toml``; ``flwr run FOLDER`` runs it.

    Args:
        folder: a new or empty one, or one that this function wrote before.
        settings: what the app is told, unless ``flwr run`` is given other values with ``--run-config``.

    Returns:
        The folder.

    Raises:
        FederatedError: there is something else in the folder, or it cannot be written.
    """
    path = Path(folder)
    files = {
        "pyproject.toml": _PROJECT.format(version=__version__, module=_MODULE, config=_config(settings.to_flower())),
        f"{_MODULE}.py": _APPS,
        "README.md": _README,
    }
    try:
        path.mkdir(parents=True, exist_ok=True)
        strange = sorted(entry.name for entry in path.iterdir() if entry.name not in {*files, "__pycache__"})
        if strange:
            raise FederatedError(f"{path} is no new folder (it holds {strange[0]!r}); give one that is empty or new")
        for name, text in files.items():
            partial = path / f"{name}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(path / name)
    except OSError as error:
        raise FederatedError(f"{path} cannot be written: {error.strerror or error}; give another folder") from error
    return path


def _config(flat: Mapping[str, Any]) -> str:
    """Group the keys by their tables: dots in a bare key would open tables of their own."""
    tables: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        table, _, name = key.rpartition(".")
        tables.setdefault(table, {})[name] = value
    head = "[tool.flwr.app.config"
    return "\n".join(f"{head}{'.' + table if table else ''}]\n{as_toml(values)}" for table, values in tables.items())


_PROJECT = """\
[project]
name = "weldnet-federation"
version = "1.0.0"
description = "A federation whose aggregation step fuses networks."
license = "Apache-2.0"
dependencies = ["weldnet[federated]>={version}"]

[tool.flwr.app]
publisher = "weldnet"

[tool.flwr.app.components]
serverapp = "{module}:server_app"
clientapp = "{module}:client_app"

{config}"""

_APPS = '''\
"""The two apps; what they do stands in the config in pyproject.toml."""

from weldnet.federated.flower import client_app, server_app

__all__ = ["client_app", "server_app"]
'''

_README = """\
# A weldnet federation, as a Flower app

    flwr run . LINK --stream
    flwr list LINK --run-id ID --format json     # the truth: `flwr run` ends well even when the run failed

Settings stand in `pyproject.toml`, under `[tool.flwr.app.config]`; `--run-config 'federated.rounds=5'` replaces one.
`out` is a folder on the machine of the SuperLink. Every SuperNode is told who it is, and may be told where its own data
and a folder for its memory are:

    flower-supernode --superlink HOST:PORT --node-config 'partition-id=0 data="/data/mine" state="/var/lib/mine"'

Every machine needs `pip install 'weldnet[federated]'`.
"""
