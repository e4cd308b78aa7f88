"""Where named datasets live: folders first, then the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from weldnet.errors import DataError

SPLIT_NAMES = {"train": ("train",), "test": ("test", "validation", "valid", "val")}
"""The names that publishers give to each of our two splits, in order of preference."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """A dataset with a short name: its home on the hub, its pixel statistics (of 0..1) per channel, its size.

    ``rows`` are those of our two splits, ``shape`` is that of an image (C, H, W).
    """

    hub: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rows: tuple[int, int]
    shape: tuple[int, int, int]
    classes: int


KNOWN = {
    "mnist": Known(
        hub="ylecun/mnist", mean=(0.1307,), std=(0.3081,), rows=(60_000, 10_000), shape=(1, 28, 28), classes=10
    ),
    "cifar10": Known(
        hub="uoft-cs/cifar10",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        rows=(50_000, 10_000),
        shape=(3, 32, 32),
        classes=10,
    ),
    "cifar100": Known(
        hub="uoft-cs/cifar100",
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        rows=(50_000, 10_000),
        shape=(3, 32, 32),
        classes=100,
    ),
    "tiny-imagenet": Known(
        hub="zh-plus/tiny-imagenet",
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        rows=(100_000, 10_000),
        shape=(3, 64, 64),
        classes=200,
    ),
}


def statistics(source: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation per channel to normalise a source with; 0.5 where unknown."""
    for name, known in KNOWN.items():
        if source in (known.hub, name) or Path(source).name.lower() == name:
            if len(known.mean) == channels:
                return known.mean, known.std
            break
    return (0.5,) * channels, (0.5,) * channels


def find_folder(name: str) -> tuple[Path | None, list[Path]]:
    """Return the first folder that holds the named dataset, and every place that was looked at."""
    looked = list(dict.fromkeys(root / name for root in _roots()))
    return next((folder for folder in looked if folder.is_dir()), None), looked


def find_files(folder: Path, split: str) -> list[Path]:
    """Return the Parquet files of one split: `test.parquet` or shards `test-*.parquet`, also one level down.

    Raises:
        DataError: if there are none.
    """
    for name in SPLIT_NAMES[split]:
        for pattern in (f"{name}.parquet", f"{name}-*.parquet", f"*/{name}.parquet", f"*/{name}-*.parquet"):
            files = sorted(folder.glob(pattern))
            if files:
                return files
    raise DataError(
        f"{folder} has no {split} split: looked for {split}.parquet and {split}-*.parquet; "
        "give a folder with one Parquet file (or shards) per split"
    )


def hub_name(source: str) -> str | None:
    """Return the hub's name of a source, or None if it cannot be on the hub."""
    if source in KNOWN:
        return KNOWN[source].hub
    return source if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) else None


def _roots() -> Iterator[Path]:
    if os.environ.get("WELDNET_DATA"):
        yield Path(os.environ["WELDNET_DATA"]).expanduser()
    checkout = Path(__file__).resolve().parents[3]
    bases = [Path.cwd()] + ([checkout] if (checkout / "pyproject.toml").is_file() else [])
    for base in bases:
        yield base / "shared" / "data"
        yield base.parent / "shared" / "data"
