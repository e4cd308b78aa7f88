"""How to train, as a frozen value, and the parts that it chooses between."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from weldnet.errors import UsageError

Optimizer = Literal["adam", "sgd"]
Schedule = Literal["cosine", "onecycle", "constant"]
Augment = Literal["none", "crop-flip"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: passes over the data.
        batch_size: images per step; the incomplete last batch of an epoch is left out.
        lr: the peak learning rate.
        optimizer: "adam" (with decoupled weight decay) or "sgd" (with Nesterov momentum).
        momentum: of "sgd".
        weight_decay: pulls every parameter to zero.
        schedule: "cosine" falls to zero from the start, "onecycle" first rises over a quarter of the steps,
            "constant" stays.
        augment: "crop-flip" shifts every image by up to 4 pixels and mirrors half of them.
        label_smoothing: share of the target spread over all classes.
        precision: "bfloat16" computes the forward pass in it; weights and steps stay in float32.
        seed: decides data order, augmentation and dropout; the initial weights are the caller's.

    Raises:
        UsageError: if a value means nothing.
    """

    epochs: int
    batch_size: int = 128
    lr: float = 1e-3
    optimizer: Optimizer = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"
    augment: Augment = "none"
    label_smoothing: float = 0.0
    precision: Precision = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("optimizer", Optimizer),
            ("schedule", Schedule),
            ("augment", Augment),
            ("precision", Precision),
        ):
            if getattr(self, name) not in get_args(known):
                choices = ", ".join(map(repr, get_args(known)))
                raise UsageError(f"{name} {getattr(self, name)!r} is unknown; choose one of {choices}")
        for name, least in (("epochs", 0), ("batch_size", 1), ("lr", 0), ("weight_decay", 0), ("seed", 0)):
            if not getattr(self, name) >= least:
                raise UsageError(f"{name} {getattr(self, name)!r} must be at least {least}")
        for name in ("momentum", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)!r} must be at least 0 and below 1")


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Make the optimizer that a recipe names, over all parameters of a model."""
    if recipe.optimizer == "adam":
        return torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        model.parameters(),
        recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
    )


def lr_factor(recipe: Recipe, done: float, rise: float = 0.25) -> float:
    """Share of the peak learning rate after the share `done` of all steps."""
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "onecycle":
        if done < rise:
            return 0.04 + 0.96 * done / rise
        done = (done - rise) / (1 - rise)
    return (1 + math.cos(math.pi * done)) / 2


def crop_flip(images: Tensor, generator: torch.Generator, margin: int = 4) -> Tensor:
    """Shift each image (N, C, H, W) by up to `margin` pixels, zeros coming in, and mirror half of them."""
    count, _, height, width = images.shape
    across, down = torch.randint(0, 2 * margin + 1, (2, count), generator=generator)
    windows = functional.pad(images, (margin,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    cropped = windows[torch.arange(count), :, down, across]
    mirror = (torch.rand(count, generator=generator) < 0.5).to(images.device)
    return torch.where(mirror.view(-1, 1, 1, 1), cropped.flip(3), cropped)
