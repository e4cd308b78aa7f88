"""The labelled images of one split, in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from weldnet.errors import DataError, UsageError


@dataclass(frozen=True, eq=False)
class Split(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels as tensors; also a PyTorch dataset of (image, label) pairs.

    Attributes:
        images: float32, normalised, (N, C, H, W).
        labels: int64, (N,), each an index into `classes`.
        classes: the class names.
        name: where the images come from, for reports.

    Raises:
        DataError: if there are no rows, the shapes do not fit together, or a label has no class.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        if self.images.dim() != 4 or not self.images.is_floating_point():
            kind = f"{self.images.dtype} of shape {tuple(self.images.shape)}"
            raise DataError(f"{self.name}: images are {kind}; give floating (N, C, H, W)")
        if self.labels.shape != self.images.shape[:1] or self.labels.is_floating_point():
            shapes = f"{tuple(self.labels.shape)} {self.labels.dtype} for {len(self.images)} images"
            raise DataError(f"{self.name}: labels are {shapes}; give one integer label per image")
        if not len(self.images):
            raise DataError(f"{self.name}: there are no rows; give at least one image")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise DataError(
                f"{self.name}: labels run from {low} to {high} but there are {len(self.classes)} classes; "
                "labels must be indices into the classes"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def rows(self, numbers: Tensor) -> Split:
        """Return some of the rows, with all classes; `partition` gives row numbers."""
        return Split(self.images[numbers], self.labels[numbers], self.classes, self.name)

    def __repr__(self) -> str:
        shape = "x".join(str(size) for size in self.images.shape)
        return f"Split({self.name!r}, images {shape}, {len(self.classes)} classes)"


def spaced_rows(rows: int, limit: int | None) -> Tensor:
    """Choose `limit` of `rows` row numbers, evenly spaced, so that files sorted by class stay balanced.

    >>> spaced_rows(10, 4).tolist(), spaced_rows(3, None).tolist()
    ([0, 2, 5, 7], [0, 1, 2])
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit!r} is below 1; give a positive number of rows, or None for all")
    if limit is None or limit >= rows:
        return torch.arange(rows)
    return torch.arange(limit) * rows // limit
