"""Accuracy, loss, calibration and agreement of one network, or of the averaged predictions of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from weldnet.errors import DataError, ModelError, UsageError
from weldnet.evaluation._predict import Labelled, predict

__all__ = [
    "BINS",
    "Evaluation",
    "Metrics",
    "agreement",
    "calibration_error",
    "ensemble_metrics",
    "evaluate",
    "evaluate_together",
    "predict_logits",
]

BINS = 15
"""Bins of the calibration error in reports: the usual number, so that values can be compared with others'."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """How well predictions fit the labels.

    Attributes:
        accuracy: share of samples whose largest output is the label, 0..1.
        loss: mean cross-entropy, in nats.
        calibration_error: expected calibration error over 15 bins, 0..1; see :func:`calibration_error`.
        samples: how many samples were seen.
    """

    accuracy: float
    loss: float
    calibration_error: float
    samples: int

    @property
    def scores(self) -> dict[str, float]:
        """What is measured, by name."""
        return {"accuracy": self.accuracy, "loss": self.loss, "calibration_error": self.calibration_error}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Several networks on the same samples.

    Attributes:
        metrics: of each network.
        ensemble: of the mean of the members' probabilities.
        agreement: of each network with each member, the share of samples with the same answer.
        with_ensemble: of each network, the share of samples on which it answers as the ensemble does.
    """

    metrics: tuple[Metrics, ...]
    ensemble: Metrics
    agreement: tuple[tuple[float, ...], ...]
    with_ensemble: tuple[float, ...]


def evaluate(
    model: nn.Module,
    data: Labelled,
    *,
    batch_size: int = 512,
    device: torch.device | str | None = None,
) -> Metrics:
    """Measure a classifier's accuracy, cross-entropy and calibration on labelled images.

    Args:
        model: maps images (N, C, H, W) to logits (N, classes); left unchanged, and used in evaluation mode.
        data: labelled images.
        batch_size: images per forward pass, where `data` is not batched already.
        device: where to compute; by default where the model is.

    Raises:
        DataError: if there are no samples, the model rejects the images, or a label has no output.
        ModelError: if the output is not (N, classes).
        UsageError: if `batch_size` is below one, or there is no such device.
    """
    (logits,), labels = predict([model], data, batch_size, device)
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
        data: labelled images; read once.
        batch_size: images per forward pass, where `data` is not batched already.
        device: where to compute; by default where each model is.

    Raises:
        DataError: as `evaluate`.
        ModelError: as `evaluate`, or if the networks have different numbers of classes.
        UsageError: if there are no models, or there is no such device.
    """
    return evaluate_together(models, data, batch_size=batch_size, device=device).ensemble


def evaluate_together(
    models: Sequence[nn.Module],
    data: Labelled,
    *,
    members: int | None = None,
    batch_size: int = 512,
    device: torch.device | str | None = None,
) -> Evaluation:
    """Measure several classifiers on the same samples: each one, the ensemble of the first, and who agrees with whom.

    Args:
        models: classifiers with the same classes.
        data: labelled images; read once.
        members: how many of the networks, from the first on, make up the ensemble; all by default.
        batch_size: images per forward pass, where `data` is not batched already.
        device: where to compute; by default where each model is.

    Raises:
        DataError, ModelError, UsageError: as `ensemble_metrics`.
    """
    count = len(models) if members is None else members
    if not 0 < count <= len(models):
        raise UsageError(f"an ensemble of {count} networks out of {len(models)} predicts nothing; give at least one")
    logits, labels = predict(models, data, batch_size, device)
    together = _mean_probabilities(logits[:count]).log()
    return Evaluation(
        metrics=tuple(_metrics(found.log_softmax(1), labels) for found in logits),
        ensemble=_metrics(together, labels),
        agreement=tuple(tuple(agreement(found, member) for member in logits[:count]) for found in logits),
        with_ensemble=tuple(agreement(found, together) for found in logits),
    )


def predict_logits(
    model: nn.Module,
    data: Labelled,
    *,
    batch_size: int = 512,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the logits (N, classes) of all samples, on the CPU; arguments and errors as `evaluate`."""
    return predict([model], data, batch_size, device)[0][0]


def calibration_error(probabilities: Tensor, labels: Tensor, *, bins: int = BINS) -> float:
    """Return the expected calibration error: how far confidence and accuracy are apart, bin by bin.

    With samples sorted by their largest probability into bins of equal width, bin m being ((m - 1) / M, m / M], it is
    ``sum_m |B_m| / n |acc(B_m) - conf(B_m)|``: accuracy and mean largest probability in the bin. 0 is best. Guo et al.,
    "On calibration of modern neural networks" (2017), https://arxiv.org/abs/1706.04599, equation 3.

    Args:
        probabilities: shape (N, classes).
        labels: shape (N,).
        bins: M.

    Raises:
        DataError: if the shapes do not fit or there are no samples.
        UsageError: if `bins` is below one.

    >>> calibration_error(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 0]))
    0.25
    """
    if bins < 1:
        raise UsageError(f"bins {bins!r} is below 1; give a positive number")
    if probabilities.dim() != 2 or not len(probabilities) or labels.shape != probabilities.shape[:1]:
        shapes = f"{tuple(probabilities.shape)} and {tuple(labels.shape)}"
        raise DataError(f"probabilities and labels of shape {shapes} do not fit; give (N, classes) and (N,)")
    confidence, answer = probabilities.double().max(1)
    correct = (answer == labels).double()
    if not bool(torch.isfinite(confidence).all()):
        return float("nan")
    # Bins are closed above: a confidence of exactly m / M lies in bin m.
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = confidence.new_zeros(bins).index_add(0, index, correct - confidence)
    return gaps.abs().sum().item() / len(labels)


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


def _mean_probabilities(logits: Sequence[Tensor]) -> Tensor:
    for found in logits[1:]:
        if found.shape != logits[0].shape:
            shapes = f"{tuple(logits[0].shape)} and {tuple(found.shape)}"
            raise ModelError(f"outputs of shape {shapes} cannot be averaged; the networks need the same classes")
    total = torch.zeros_like(logits[0], dtype=torch.float64)
    for found in logits:
        total += found.double().softmax(1)
    return total / len(logits)


def _metrics(log_probabilities: Tensor, labels: Tensor) -> Metrics:
    correct = int((log_probabilities.argmax(1) == labels).sum())
    return Metrics(
        accuracy=correct / len(labels),
        loss=functional.nll_loss(log_probabilities.double(), labels).item(),
        calibration_error=calibration_error(log_probabilities.double().exp(), labels),
        samples=len(labels),
    )
