"""Accuracy and loss of one network, or of the averaged predictions of several."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from weldnet.data import Split
from weldnet.errors import DataError, ModelError, UsageError
from weldnet.structure import output_tensors

Labelled: TypeAlias = Split | Dataset[Any] | Iterable[tuple[Tensor, Tensor]]
"""A split, a dataset of (image, label) pairs, or (images, labels) batches such as a DataLoader's."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """How well predictions fit the labels.

    Attributes:
        accuracy: share of samples whose largest output is the label, 0..1.
        loss: mean cross-entropy, in nats.
        samples: how many samples were seen.
    """

    accuracy: float
    loss: float
    samples: int


def evaluate(
    model: nn.Module,
    data: Labelled,
    *,
    batch_size: int = 512,
    device: torch.device | str | None = None,
) -> Metrics:
    """Measure a classifier's accuracy and cross-entropy on labelled images.

    Args:
        model: maps images (N, C, H, W) to logits (N, classes); left unchanged, and used in evaluation mode.
        data: labelled images.
        batch_size: images per forward pass, where `data` is not batched already.
        device: where to compute; by default where the model is.

    Raises:
        DataError: if there are no samples, the model rejects the images, or a label has no output.
        ModelError: if the output is not (N, classes).
        UsageError: if `batch_size` is below one.
    """
    logits, labels = _predict(model, data, batch_size, device)
    return _metrics(logits.log_softmax(1), labels)


def ensemble_metrics(
    models: Sequence[nn.Module],
    data: Labelled,
    *,
    batch_size: int = 512,
    device: torch.device | str | None = None,
) -> Metrics:
    """Measure the ensemble: the mean of the networks' softmax probabilities.

    Args:
        models: classifiers with the same classes.
        data: labelled images, in the same order on every pass.
        batch_size: images per forward pass, where `data` is not batched already.
        device: where to compute; by default where each model is.

    Raises:
        DataError: as `evaluate`.
        ModelError: as `evaluate`, or if the networks have different numbers of classes.
        UsageError: if there are no models.
    """
    if not models:
        raise UsageError("an ensemble of 0 networks predicts nothing; give at least one")
    total: Tensor | None = None
    labels = torch.empty(0)
    for model in models:
        logits, labels = _predict(model, data, batch_size, device)
        probabilities = logits.double().softmax(1)
        if total is not None and total.shape != probabilities.shape:
            shapes = f"{tuple(total.shape)} and {tuple(probabilities.shape)}"
            raise ModelError(f"outputs of shape {shapes} cannot be averaged; the networks need the same classes")
        total = probabilities if total is None else total + probabilities
    assert total is not None
    return _metrics((total / len(models)).log(), labels)


def predict_logits(
    model: nn.Module,
    data: Labelled,
    *,
    batch_size: int = 512,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the logits (N, classes) of all samples, on the CPU; arguments and errors as `evaluate`."""
    return _predict(model, data, batch_size, device)[0]


def agreement(logits_a: Tensor, logits_b: Tensor) -> float:
    """Return the share of samples on which two networks' largest logits (N, classes) agree.

    Raises:
        DataError: if the shapes differ or there are no samples.

    >>> agreement(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 1.0], [3.0, 1.0]]))
    0.5
    """
    if logits_a.shape != logits_b.shape or logits_a.dim() != 2 or not len(logits_a):
        shapes = f"{tuple(logits_a.shape)} and {tuple(logits_b.shape)}"
        raise DataError(f"logits of shape {shapes} cannot be compared; give two of the same (N, classes)")
    return (logits_a.argmax(1) == logits_b.argmax(1)).double().mean().item()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients; give every module its training flag back after."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def _predict(
    model: nn.Module, data: Labelled, batch_size: int, device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    home = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    target = torch.device(device) if device is not None else home
    if target != home:
        model = copy.deepcopy(model).to(target)
    outputs, answers = [], []
    with evaluation_mode(model):
        for images, labels in _batches(data, batch_size):
            outputs.append(_forward(model, _fitted(images, model).to(target)).float().cpu())
            answers.append(labels.cpu())
    if not sum(map(len, answers)):
        raise DataError("there are no samples to evaluate on; give at least one labelled image")
    logits, labels = torch.cat(outputs), torch.cat(answers)
    if int(labels.max()) >= logits.shape[1]:
        raise DataError(
            f"label {int(labels.max())} has no output: the model has {logits.shape[1]}; "
            "give data with the classes that the model was trained on"
        )
    return logits, labels


def _batches(data: Labelled, batch_size: int) -> Iterable[tuple[Tensor, Tensor]]:
    if batch_size < 1:
        raise UsageError(f"batch_size {batch_size!r} is below 1; give a positive number of images")
    if isinstance(data, Split):
        return zip(data.images.split(batch_size), data.labels.split(batch_size), strict=True)
    return DataLoader(data, batch_size=batch_size) if isinstance(data, Dataset) else data


def _fitted(images: Tensor, model: nn.Module) -> Tensor:
    """Give floating images the precision of the model, so that half-precision networks can be measured too."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype)
    return images.to(dtype) if images.is_floating_point() else images


def _forward(model: nn.Module, images: Tensor) -> Tensor:
    try:
        result = model(images)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{_mismatch(model, images)} ({str(error).partition(chr(10))[0]})") from error
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


def _mismatch(model: nn.Module, images: Tensor) -> str:
    shape = tuple(images.shape[1:])
    name, weight = next(iter(model.named_parameters()), ("", torch.empty(0)))
    return (
        f"images of shape {shape} do not fit the model, whose first weight {name!r} has "
        f"shape {tuple(weight.shape)}; "
        "give the model or the data that belong together"
    )


def _metrics(log_probabilities: Tensor, labels: Tensor) -> Metrics:
    correct = int((log_probabilities.argmax(1) == labels).sum())
    loss = functional.nll_loss(log_probabilities.double(), labels).item()
    return Metrics(accuracy=correct / len(labels), loss=loss, samples=len(labels))
