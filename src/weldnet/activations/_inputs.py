"""Unlabelled inputs from whatever holds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from weldnet.errors import DataError

__all__ = ["Inputs", "held", "unlabelled_batches"]

#: A tensor (N, ...), a Dataset, a DataLoader, or any iterable of batches. A batch is a tensor, or a tuple or list
#: whose first entry is one: labels behind it are ignored.
Inputs = Tensor | Dataset[Any] | Iterable[Any]


def unlabelled_batches(data: Inputs, *, samples: int, batch_size: int = 128) -> Iterator[Tensor]:
    """Yield input batches, labels dropped, until ``samples`` inputs were given.

    Raises:
        DataError: no data, batches that are not tensors, or NaN or infinity in them.
    """
    seen = 0
    for batch in _batches(data, batch_size):
        inputs = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
        if isinstance(inputs, Mapping) or not isinstance(inputs, Tensor):
            raise DataError(f"a batch is a {type(inputs).__name__}; give tensors of inputs, or (inputs, labels) pairs")
        inputs = inputs[: samples - seen]
        if inputs.is_floating_point() and not bool(inputs.isfinite().all()):
            where = f"{seen} to {seen + len(inputs) - 1}"
            raise DataError(f"the unlabelled data holds NaN or infinity among inputs {where}; mend or leave them out")
        seen += len(inputs)
        if len(inputs):
            yield inputs
        if seen >= samples:
            return
    if not seen:
        raise DataError("the unlabelled data is empty; give at least one batch, or leave data out")


def held(data: Inputs, *, samples: int = 4096) -> Inputs:
    """Return data that can be read again: an iterator's first ``samples`` inputs, anything else as it is."""
    return list(unlabelled_batches(data, samples=samples)) if isinstance(data, Iterator) else data


def _batches(data: Inputs, batch_size: int) -> Iterable[Any]:
    if isinstance(data, Tensor):
        return torch.split(data, batch_size) if len(data) else ()
    if isinstance(data, Dataset):
        if not len(data):  # pyright: ignore[reportArgumentType]
            return ()
        return DataLoader(data, batch_size=batch_size)
    return data
