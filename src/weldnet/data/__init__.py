"""Labelled images from a folder of Parquet files, from the Hugging Face hub, or embedded in scikit-learn.

Pictures are read into memory. The extra `weldnet[data]` is needed, and imported only when it is used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from weldnet.data._decode import Pixels, read_hub, read_parquet
from weldnet.data._identity import Identity, identity_of
from weldnet.data._partition import SCHEMES, Scheme, partition
from weldnet.data._sources import KNOWN, SPLIT_NAMES, find_files, find_folder, hub_name, statistics
from weldnet.data._split import Split, spaced_rows
from weldnet.errors import DataError, UsageError

__all__ = [
    "KNOWN_SIZES",
    "NAMES",
    "SCHEMES",
    "Identity",
    "Scheme",
    "Split",
    "hub_name",
    "identify",
    "load",
    "normalisation",
    "partition",
]

NAMES: tuple[str, ...] = ("digits", *KNOWN)
"""The datasets that have a short name."""

KNOWN_SIZES: Mapping[str, tuple[int, tuple[int, ...], int]] = {
    "digits": (1437, (1, 8, 8), 10),
    **{name: (known.rows[0], known.shape, known.classes) for name, known in KNOWN.items()},
}
"""Of each of these its training rows, the shape of an image (C, H, W), and the number of classes."""

_DIGITS_MEAN, _DIGITS_STD = 0.3053, 0.3761


def load(
    source: str | os.PathLike[str], *, split: Literal["train", "test"] = "test", limit: int | None = None
) -> Split:
    """Load one split of a labelled image dataset into memory, normalised.

    A short name (`NAMES`) other than "digits" is looked up in $WELDNET_DATA, then in `shared/data` in and
    beside the working directory and the checkout, then on the Hugging Face hub. Decoded images are cached in
    $WELDNET_CACHE (or ~/.cache/weldnet).

    Args:
        source: a short name; a folder with `train.parquet` and `test.parquet` (or `train-*.parquet` shards)
            with the columns `image` or `img` ({bytes, path}) and `label` or `fine_label`; or a hub name
            `org/name`.
        split: which split.
        limit: how many rows at most, taken at even distances; all of them by default.

    Returns:
        float32 images (N, C, H, W), normalised by the dataset's known mean and deviation, otherwise from 0..1
        to -1..1, with int64 labels.

    Raises:
        DataError: if the data is missing, unreachable, empty, without labels, or of differing sizes.
        UsageError: if `split` or `limit` means nothing.

    >>> load("digits")
    Split('digits', images 360x1x8x8, 10 classes)
    """
    if split not in SPLIT_NAMES:
        raise UsageError(f"split {split!r} is unknown; choose 'train' or 'test'")
    try:
        return _digits(split, limit) if source == "digits" else _pictures(os.fspath(source), split, limit)
    except ImportError as error:
        message = f"loading {source} needs the package {error.name}; pip install 'weldnet[data]'"
        raise DataError(message) from error


def identify(source: str | os.PathLike[str], *, split: Literal["train", "test"] = "test") -> Identity:
    """Say which rows a split has, without normalising them: what tells networks of other data apart.

    Args:
        source: as for :func:`load`.
        split: which split.

    Raises:
        DataError, UsageError: as :func:`load`.

    >>> identify("digits").rows, identify("digits").shape, identify("digits").synthetic
    (360, (1, 8, 8), '')
    """
    if split not in SPLIT_NAMES:
        raise UsageError(f"split {split!r} is unknown; choose 'train' or 'test'")
    if source == "digits":
        found = load("digits", split=split)
        return identity_of("digits", split, found.images.permute(0, 2, 3, 1).numpy(), found.labels.numpy(), 10)
    name = os.fspath(source)
    try:
        pixels = _pixels(name, split)
    except ImportError as error:
        raise DataError(f"loading {name} needs the package {error.name}; pip install 'weldnet[data]'") from error
    return identity_of(name, split, pixels.images, pixels.labels, len(pixels.classes))


def normalisation(images: Split) -> str:
    """Say how `load` made the images of a split from pixels.

    >>> normalisation(load("digits"))
    '(x/16 - mean)/std with mean 0.3053, std 0.3761'
    """
    if images.name == "digits":
        return f"(x/16 - mean)/std with mean {_DIGITS_MEAN}, std {_DIGITS_STD}"
    mean, std = (", ".join(map(str, value)) for value in statistics(images.name, images.images.shape[1]))
    return f"(x/255 - mean)/std with mean {mean}, std {std}"


def _digits(split: str, limit: int | None) -> Split:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    cut = len(labels) * 4 // 5
    rows = order[:cut] if split == "train" else order[cut:]
    rows = rows[spaced_rows(len(rows), limit)]
    pixels = torch.from_numpy(images).float().view(-1, 1, 8, 8)[rows] / 16
    classes = tuple(str(digit) for digit in range(10))
    return Split((pixels - _DIGITS_MEAN) / _DIGITS_STD, torch.from_numpy(labels).long()[rows], classes, "digits")


def _pictures(source: str, split: str, limit: int | None) -> Split:
    pixels = _pixels(source, split)
    rows = spaced_rows(len(pixels.labels), limit)
    images = torch.from_numpy(pixels.images)[rows].permute(0, 3, 1, 2)
    return Split(_normalise(images, source), torch.from_numpy(pixels.labels)[rows], pixels.classes, source)


def _pixels(source: str, split: str) -> Pixels:
    folder, looked = find_folder(source) if source in KNOWN else (Path(source).expanduser(), [])
    hub = hub_name(source)
    if folder is not None and folder.is_dir():
        return read_parquet(find_files(folder, split), source)
    if hub is not None:
        places = " or ".join(str(place) for place in looked or [Path(source).absolute()])
        why = f"dataset {source!r} is not in {places} (set WELDNET_DATA to the folder that holds datasets)"
        return read_hub(hub, SPLIT_NAMES[split], why)
    raise DataError(
        f"{source} is not a folder or a known dataset; give a folder with {split}.parquet, "
        f"a hub name org/name, or one of {', '.join(NAMES)}"
    )


def _normalise(images: Tensor, source: str) -> Tensor:
    """Map uint8 (N, C, H, W) to contiguous float32 with the source's mean and deviation taken out."""
    channels = images.shape[1]
    mean, std = (torch.tensor(value).view(channels, 1, 1) for value in statistics(source, channels))
    out = torch.empty(images.shape, dtype=torch.float32)
    return out.copy_(images).div_(255).sub_(mean).div_(std)
