"""The data of a study: loaded once a process, identified, and split among networks; the splits are kept as files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from weldnet import data
from weldnet.checkpoints import atomic_path
from weldnet.data import KNOWN_SIZES, Identity, Split
from weldnet.errors import DataError

__all__ = ["identify_all", "load_split", "marked", "save_partition", "split_size"]

SYNTHETIC = " (synthetic data)"


@lru_cache(maxsize=4)
def load_split(name: str, split: Literal["train", "test"], rows: int | None = None) -> Split:
    """Load a split, or take the one that this process has loaded already.

    Raises:
        DataError: as :func:`weldnet.data.load`, with what to download and where to put it.
    """
    return data.load(name, split=split, limit=rows)


def identify_all(names: Iterable[str]) -> dict[tuple[str, str], Identity]:
    """Identify both splits of datasets.

    Raises:
        DataError: one is not there; the message says what to download and where to put it.
    """
    found: dict[tuple[str, str], Identity] = {}
    for name in dict.fromkeys(names):
        for split in ("train", "test"):
            try:
                found[name, split] = data.identify(name, split=split)
            except DataError as error:
                raise DataError(f"{error}{_way_out(name)}") from error
    return found


def marked(name: str, identities: Mapping[tuple[str, str], Identity]) -> str:
    """Return the name of a dataset as records have it: data that is not the dataset's own is marked."""
    synthetic = any(identity.synthetic for (known, _), identity in identities.items() if known == name)
    return name + SYNTHETIC if synthetic else name


def split_size(name: str, identities: Mapping[tuple[str, str], Identity]) -> tuple[int, tuple[int, ...], int]:
    """Return the training rows, the shape of an image and the number of classes, as far as they are known."""
    found = identities.get((name, "train"))
    if found is not None:
        return found.rows, found.shape, found.classes
    return KNOWN_SIZES.get(name, (0, (), 0))


def save_partition(folder: Path, name: str, parts: Iterable[Tensor], about: Mapping[str, Any]) -> Path:
    """Write the row numbers of every part to ``<folder>/<name>.npz`` unless they are there.

    Args:
        folder: of a run's partitions.
        name: of the file.
        parts: row numbers of the training split, one tensor a part; array ``part0``, ``part1``, ... in the file.
        about: how they were drawn; text in the array ``about``.
    """
    path = folder / f"{name}.npz"
    arrays = {f"part{number}": rows.numpy() for number, rows in enumerate(parts)}
    if _holds(path, arrays):
        return path
    import json

    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays, about=np.array(json.dumps(dict(about), sort_keys=True)))  # pyright: ignore[reportArgumentType]
    return path


def load_partition(path: Path) -> list[Tensor]:
    """Read the row numbers of every part from an index file."""
    with np.load(path, allow_pickle=False) as arrays:
        count = sum(name.startswith("part") for name in arrays)
        return [torch.from_numpy(arrays[f"part{number}"]) for number in range(count)]


def _holds(path: Path, arrays: Mapping[str, np.ndarray]) -> bool:
    try:
        found = load_partition(path)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return False
    return len(found) == len(arrays) and all(
        np.array_equal(rows.numpy(), arrays[f"part{number}"]) for number, rows in enumerate(found)
    )


def _way_out(name: str) -> str:
    hub = data.hub_name(name)
    if hub is None or name not in data.NAMES:
        return ""
    return (
        f"; download the Parquet files of https://huggingface.co/datasets/{hub} to $WELDNET_DATA/{name}/ "
        "(train-*.parquet and test-*.parquet or valid-*.parquet)"
    )
