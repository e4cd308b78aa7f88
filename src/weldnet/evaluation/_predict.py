"""Logits of several networks on the same batches of labelled data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from weldnet._arrays import find_device, send
from weldnet._modules import evaluation_mode, explained, fast_layout, home, placed
from weldnet.data import Split
from weldnet.errors import DataError, ModelError, UsageError
from weldnet.structure import output_tensors

__all__ = ["Labelled", "labelled_batches", "predict"]

Labelled: TypeAlias = Split | Dataset[Any] | tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]
"""A split, a dataset of (image, label) pairs, (images, labels) tensors, or batches of them such as a DataLoader's."""


def predict(
    models: Sequence[nn.Module], data: Labelled, batch_size: int, device: torch.device | str | None
) -> tuple[list[Tensor], Tensor]:
    """Return the logits (N, classes) of each network and the labels (N,), on the CPU.

    The data is read once, so that the networks see the same samples also where a loader shuffles. A batch goes once to
    each device, and the logits come back all at once.
    """
    target = find_device(device)
    ready = [placed(model, target) for model in models]
    outputs: list[list[Tensor]] = [[] for _ in ready]
    answers: list[Tensor] = []
    with ExitStack() as stack:
        for model in ready:
            stack.enter_context(evaluation_mode(model))
        layout: torch.memory_format | None = None
        for images, labels in labelled_batches(data, batch_size):
            layout = layout or fast_layout(ready, images)
            there: dict[tuple[torch.device, torch.dtype], Tensor] = {}
            for model, found in zip(ready, outputs, strict=True):
                kind = home(model), _fitting(images, model)
                if kind not in there:
                    there[kind] = send(images, *kind, memory_format=layout)
                found.append(_forward(model, there[kind]).float())
            answers.append(labels)
    if not sum(map(len, answers)):
        raise DataError("there are no samples to evaluate on; give at least one labelled image")
    logits, labels = [torch.cat(found).cpu() for found in outputs], torch.cat(answers).cpu()
    for found in logits:
        if int(labels.max()) >= found.shape[1]:
            raise DataError(
                f"label {int(labels.max())} has no output: the model has {found.shape[1]}; "
                "give data with the classes that the model was trained on"
            )
    return logits, labels


def labelled_batches(data: Labelled, batch_size: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Return the (inputs, labels) batches of labelled data; `batch_size` counts where it is not batched already.

    Raises:
        DataError: data, or a batch of it, that is no (inputs, labels).
        UsageError: a batch size below 1.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size {batch_size!r} is below 1; give a positive number of images")
    if isinstance(data, Split):
        return zip(data.images.split(batch_size), data.labels.split(batch_size), strict=True)
    if isinstance(data, Dataset):
        return _pairs(DataLoader(data, batch_size=batch_size))
    if isinstance(data, Tensor | Mapping) or not isinstance(data, Iterable):
        raise DataError(
            f"labelled data is a value of type {type(data).__name__}; give (inputs, labels), or a Dataset or "
            "DataLoader of such pairs"
        )
    pair = list(data) if isinstance(data, tuple) and len(data) == 2 else []
    if not pair or not all(isinstance(part, Tensor) for part in pair):
        return _pairs(data)
    images, labels = cast(list[Tensor], pair)
    if len(images) != len(labels):
        raise DataError(f"there are {len(images)} images and {len(labels)} labels; give one label for each image")
    return zip(images.split(batch_size), labels.split(batch_size), strict=True)


def _pairs(batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        if not isinstance(batch, tuple | list):
            raise DataError(f"a batch of labelled data is a {type(batch).__name__}; give (inputs, labels) tensors")
        parts = cast(Sequence[Any], batch)
        if len(parts) != 2 or not all(isinstance(part, Tensor) for part in parts):
            found = ", ".join(type(part).__name__ for part in parts)
            raise DataError(f"a batch of labelled data is ({found}); give (inputs, labels) tensors")
        yield parts[0], parts[1]


def _fitting(images: Tensor, model: nn.Module) -> torch.dtype:
    """Return for floating images the precision of the model, so that half-precision networks can be measured too."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype)
    return dtype if images.is_floating_point() else images.dtype


def _forward(model: nn.Module, images: Tensor) -> Tensor:
    with explained(model, f"images of shape {tuple(images.shape[1:])}"):
        result = model(images)
    logits = _answer(result)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"the model's output is {got}; evaluation needs logits of ({len(images)}, classes)")
    return logits


def _answer(result: Any) -> Any:
    """Return the logits among named outputs, as the transformers library gives them; else what is returned."""
    if not isinstance(result, Mapping):
        return result
    tensors = output_tensors(result)
    return tensors[0] if len(tensors) == 1 else result
