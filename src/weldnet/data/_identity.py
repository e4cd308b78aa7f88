"""What a split of a dataset is: how many rows of which shape, and which."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import final

import numpy as np

from weldnet.data._sources import KNOWN


@final
@dataclass(frozen=True)
class Identity:
    """One split of a dataset.

    Args:
        name: where it comes from.
        split: train or test.
        rows: how many there are.
        shape: of one image, (C, H, W).
        classes: how many there are.
        sha256: of all pixels and labels.
        synthetic: why these are not the rows of the dataset of that name; empty if nothing speaks against it.
    """

    name: str
    split: str
    rows: int
    shape: tuple[int, ...]
    classes: int
    sha256: str
    synthetic: str = ""


def identity_of(name: str, split: str, images: np.ndarray, labels: np.ndarray, classes: int) -> Identity:
    """Identify decoded images, (N, H, W, C), with their labels."""
    digest = hashlib.sha256(f"{images.shape} {images.dtype}".encode())
    digest.update(np.ascontiguousarray(images).data)
    digest.update(np.ascontiguousarray(labels).data)
    height, width, channels = images.shape[1:]
    shape = (channels, height, width)
    why = _why_synthetic(name, split, len(images), shape, classes)
    return Identity(name, split, len(images), shape, classes, digest.hexdigest(), why)


def _why_synthetic(name: str, split: str, rows: int, shape: tuple[int, ...], classes: int) -> str:
    """Say what differs from the dataset that has this name."""
    known = KNOWN.get(name)
    if known is None:
        return ""
    wanted = known.rows[("train", "test").index(split)], known.shape, known.classes
    for what, found, right in zip(("rows", "shape", "classes"), (rows, shape, classes), wanted, strict=True):
        if found != right:
            return f"{name} has {what} {found} in its {split} split, the dataset of that name has {right}"
    return ""
