"""After fusing: a short training on labels, or towards the parents' ensemble without labels."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weldnet._arrays import find_device
from weldnet._modules import bare, home
from weldnet.activations import Inputs, unlabelled_batches
from weldnet.checkpoints import tensors_sha256
from weldnet.data import Split
from weldnet.errors import DataError, ModelError, UsageError
from weldnet.evaluation import Labelled, labelled_batches
from weldnet.training._objective import Ensemble, Labels, check_fits
from weldnet.training._recipe import Recipe
from weldnet.training._run import TrainingResult, check_labels, run

__all__ = ["DISTILLING", "FINE_TUNING", "distil", "fine_tune"]

FINE_TUNING = Recipe(epochs=1, lr=1e-3)
"""One pass over the labelled data."""

DISTILLING = Recipe(epochs=3, lr=1e-3)
"""Three passes over the unlabelled data."""


def fine_tune(
    model: nn.Module,
    data: Labelled,
    recipe: Recipe = FINE_TUNING,
    *,
    validation: Split | None = None,
    device: torch.device | str | None = None,
    state_path: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> TrainingResult:
    """Train a copy of a fused network on labelled data, shortly.

    Args:
        model: maps inputs (N, ...) to logits (N, classes); it is not changed.
        data: labelled inputs, which are held in memory.
        recipe: the settings.
        validation: images to measure the accuracy on after every epoch.
        device: where to train; by default where the model is.
        state_path: where to keep the state after every epoch, written atomically.
        resume: continue from `state_path` if that file exists.
        progress: show a progress bar on stderr when it is a terminal.

    Returns:
        As :func:`weldnet.training.train`; the same arguments give bit-equal weights, interrupted or not.

    Raises:
        DataError: if the model rejects the inputs or has too few outputs for the labels.
        TrainingError: if the loss is not finite, or the saved state is unreadable, unwritable or of another run.
        UsageError: if the recipe has no epochs, `resume` is asked for without a `state_path`, or there is no such
            device.
    """
    _check_epochs(recipe)
    model = bare(model)
    inputs, labels, name = _labelled(data)
    check_labels(model, inputs, labels, name)
    objective = Labels(inputs, labels, name, recipe.label_smoothing)
    objective.identity = {"start": tensors_sha256(model.state_dict())}
    return run(
        model,
        objective,
        recipe,
        validation=validation,
        device=device,
        state_path=state_path,
        resume=resume,
        progress=progress,
    )


def distil(
    model: nn.Module,
    parents: Sequence[nn.Module] | Mapping[str, nn.Module],
    data: Inputs,
    recipe: Recipe = DISTILLING,
    *,
    temperature: float = 1.0,
    samples: int | None = None,
    validation: Split | None = None,
    device: torch.device | str | None = None,
    state_path: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> TrainingResult:
    """Train a copy of a fused network towards the ensemble of its parents, on unlabelled data.

    Lowers ``T^2 KL(mean_k softmax(z_k / T) || softmax(z / T))``, the divergence of the network's probabilities from the
    parents' mean. Labels in the data are ignored.

    Args:
        model: maps inputs (N, ...) to logits (N, classes); it is not changed.
        parents: networks with the same inputs and classes, in evaluation mode; not changed.
        data: unlabelled inputs, which are held in memory.
        recipe: the settings; label smoothing has no meaning here.
        temperature: T; above 1 the parents' smaller probabilities count more.
        samples: how many inputs at most.
        validation: images to measure the accuracy on after every epoch.
        device: where to train; by default where the model is.
        state_path: where to keep the state after every epoch, written atomically.
        resume: continue from `state_path` if that file exists.
        progress: show a progress bar on stderr when it is a terminal.

    Returns:
        As :func:`weldnet.training.train`; accuracies in the history are agreements with the ensemble.

    Raises:
        DataError: if a network rejects the inputs, or there are none.
        ModelError: if the networks have different numbers of classes.
        TrainingError: as :func:`fine_tune`.
        UsageError: if there are no parents, the temperature is not above 0, the recipe has no epochs, labels are to be
            smoothed, or `resume` is asked for without a `state_path`.

    Source: Hinton et al., "Distilling the knowledge in a neural network" (2015), https://arxiv.org/abs/1503.02531.
    """
    teachers = [bare(parent) for parent in (parents.values() if isinstance(parents, Mapping) else parents)]
    if not teachers:
        raise UsageError("there are no parents to distil from; give at least one")
    if not 0 < temperature < float("inf"):
        raise UsageError(f"temperature {temperature!r} must be above 0 and finite")
    _check_epochs(recipe)
    if recipe.label_smoothing:
        raise UsageError(f"label_smoothing {recipe.label_smoothing!r} has no meaning without labels; leave it at 0")
    model = bare(model)
    inputs, name = _unlabelled(data, samples)
    classes = [check_fits(network, inputs, name) for network in (model, *teachers)]
    if len(set(classes)) > 1:
        raise ModelError(f"the networks have {', '.join(map(str, classes))} classes; parents need those of the model")
    target = find_device(device) or home(model)
    objective = Ensemble(teachers, inputs, name, temperature, target)
    objective.identity = {**objective.identity, "start": tensors_sha256(model.state_dict())}
    return run(
        model,
        objective,
        recipe,
        validation=validation,
        device=target,
        state_path=state_path,
        resume=resume,
        progress=progress,
    )


def _check_epochs(recipe: Recipe) -> None:
    if recipe.epochs < 1:
        raise UsageError(f"epochs {recipe.epochs} trains nothing; give 1 or more")


def _labelled(data: Labelled) -> tuple[Tensor, Tensor, str]:
    if isinstance(data, Split):
        return data.images, data.labels, data.name
    batches = list(labelled_batches(data, 512))
    if not sum(len(labels) for _, labels in batches):
        raise DataError("there is no labelled data to train on; give at least one sample")
    inputs, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    return inputs, labels, "data"


def _unlabelled(data: Any, samples: int | None) -> tuple[Tensor, str]:
    if samples is not None and samples < 1:
        raise UsageError(f"samples {samples!r} is below 1; give a positive number, or None for all")
    if isinstance(data, Split):
        return data.images[:samples], data.name
    return torch.cat(list(unlabelled_batches(data, samples=samples or sys.maxsize))), "data"
