"""One training run: epochs, saved states, and the way back to them."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from weldnet._arrays import find_device, send
from weldnet._modules import bring, fast_layout, home
from weldnet.data import Split
from weldnet.errors import DataError, TrainingError, UsageError
from weldnet.training._objective import Labels, Objective, check_fits, in_layout
from weldnet.training._recipe import Recipe, crop_flip, lr_factor, make_optimizer
from weldnet.training._tally import Tally

_log = logging.getLogger(__name__)
_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one epoch gave: loss and accuracy on (augmented) training images, accuracy on held-out images.

    When an ensemble is distilled, the accuracy is the agreement with it.
    """

    epoch: int
    loss: float
    accuracy: float
    validation: float | None
    seconds: float


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingResult:
    """A trained network and how it got there.

    Attributes:
        model: the trained copy; the network that was given is unchanged.
        recipe: the settings.
        history: one entry per epoch, those before a resume included.
    """

    model: nn.Module
    recipe: Recipe
    history: tuple[Epoch, ...]

    @property
    def seconds(self) -> float:
        """Seconds spent in all epochs."""
        return sum(epoch.seconds for epoch in self.history)


def initialise(factory: Callable[[], _Module], seed: int) -> _Module:
    """Build a model whose initial weights `seed` decides, leaving PyTorch's global generator as it was.

    >>> a, b = (initialise(lambda: nn.Linear(2, 2), seed=7) for _ in range(2))
    >>> torch.equal(a.weight, b.weight)
    True
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return factory()


def train(
    model: nn.Module,
    data: Split,
    recipe: Recipe,
    *,
    validation: Split | None = None,
    device: torch.device | str | None = None,
    state_path: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> TrainingResult:
    """Train a copy of a classifier with cross-entropy.

    The same model, data, recipe, device and thread count give bit-equal weights, also when a run was
    interrupted and resumed; on a GPU where torch.use_deterministic_algorithms(True) was asked for.

    Args:
        model: maps images (N, C, H, W) to logits (N, classes); it is not changed.
        data: the training images.
        recipe: the settings.
        validation: images to measure the accuracy on after every epoch.
        device: where to train; by default where the model is.
        state_path: where to keep the state after every epoch, written atomically.
        resume: continue from `state_path` if that file exists.
        progress: show a progress bar on stderr when it is a terminal.

    Returns:
        The trained copy, on the model's own device and with its own training flags, and the history.

    Raises:
        DataError: if the model rejects the images or has too few outputs for the labels.
        TrainingError: if the loss is not finite, or the saved state is unreadable, unwritable or of another
            run.
        UsageError: if `resume` is asked for without a `state_path`, or there is no such device.
    """
    check_labels(model, data.images, data.labels, data.name)
    objective = Labels(data.images, data.labels, data.name, recipe.label_smoothing)
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


def run(
    model: nn.Module,
    objective: Objective,
    recipe: Recipe,
    *,
    validation: Split | None = None,
    device: torch.device | str | None = None,
    state_path: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> TrainingResult:
    """Lower an objective on a copy of a network; arguments, result and errors as `train`."""
    if resume and state_path is None:
        raise UsageError("resume=True needs a state_path; give the file that the interrupted run wrote")
    if recipe.augment != "none" and objective.inputs.dim() != 4:
        raise UsageError(f"augment {recipe.augment!r} is for images (N, C, H, W); give augment='none'")
    work = _Run(copy.deepcopy(model), objective, recipe, find_device(device) or home(model))
    path = Path(state_path) if state_path is not None else None
    if path is not None and resume and path.exists():
        work.restore(path)
    with _bar(progress, recipe.epochs * work.steps, len(work.history) * work.steps) as tick:
        while len(work.history) < recipe.epochs:
            work.advance(validation, tick)
            if path is not None:
                work.save(path)
    trained = bring(in_layout(work.model, torch.contiguous_format), home(model))
    for module, original in zip(trained.modules(), model.modules(), strict=True):
        module.training = original.training
    return TrainingResult(model=trained, recipe=recipe, history=tuple(work.history))


class _Run:
    """A training run between two epochs; everything random derives from the seed and the epoch's number."""

    def __init__(self, model: nn.Module, objective: Objective, recipe: Recipe, device: torch.device):
        self.model = bring(model, device)
        self.layout = fast_layout([model, *objective.networks], objective.inputs)
        for network in (model, *objective.networks):
            in_layout(network, self.layout)
        self.objective = objective
        objective.attach(self.model)
        self.recipe = recipe
        self.device = device
        self.steps = max(1, len(objective.inputs) // recipe.batch_size)
        self.optimizer = make_optimizer(model, recipe)
        self.history: list[Epoch] = []

    def advance(self, validation: Split | None, tick: Callable[[], None]) -> None:
        """Train one more epoch."""
        start, index = time.perf_counter(), len(self.history)
        tally = Tally(index + 1, self.recipe)
        self.model.train()
        with _seeded(self.recipe.seed, index) as generator:
            order = torch.randperm(len(self.objective.inputs), generator=generator)
            for step in range(self.steps):
                rows = order[step * self.recipe.batch_size : (step + 1) * self.recipe.batch_size]
                tally.add(*self._step(rows, index * self.steps + step, generator), len(rows))
                tick()
            tally.settle()
        held_out = self._accuracy(validation) if validation is not None else None
        seconds = time.perf_counter() - start
        self.history.append(
            Epoch(
                epoch=index + 1,
                loss=tally.loss / tally.seen,
                accuracy=tally.correct / tally.seen,
                validation=held_out,
                seconds=seconds,
            )
        )
        _log.info("epoch %d of %d: %s", index + 1, self.recipe.epochs, self.history[-1])

    def _step(self, rows: Tensor, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor | float]:
        images = self.objective.inputs[rows]
        if self.recipe.augment == "crop-flip":
            images = crop_flip(images, generator)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * lr_factor(self.recipe, number / (self.recipe.epochs * self.steps))
        self.optimizer.zero_grad()
        images = self._placed(images)
        loss, right = self.objective(self._forward(images), rows, images)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), right

    def _placed(self, images: Tensor) -> Tensor:
        return send(images, self.device, memory_format=self.layout)

    def _forward(self, images: Tensor) -> Tensor:
        half = self.recipe.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
            return self.model(images).float()

    @torch.no_grad()
    def _accuracy(self, data: Split) -> float:
        self.model.eval()
        right: list[Tensor] = []
        for images, labels in zip(data.images.split(512), data.labels.split(512), strict=True):
            answers = self._forward(self._placed(images)).argmax(1)
            right.append((answers == send(labels, self.device)).sum())
        return int(torch.stack(right).sum()) / len(data)

    def save(self, path: Path) -> None:
        """Write the state atomically."""
        scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        state = {
            "identity": self._identity(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": [asdict(epoch) for epoch in self.history],
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, scratch)
            os.replace(scratch, path)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                scratch.unlink()
            raise TrainingError(f"the training state {path} cannot be written ({error})") from error
        except BaseException:
            with suppress(OSError):
                scratch.unlink()
            raise

    def restore(self, path: Path) -> None:
        """Go back to a saved state of this very run."""
        try:
            # Loading puts every tensor where its parameter lies, but for the count of steps, which belongs on the CPU.
            state = torch.load(path, map_location="cpu", weights_only=True)
            identity, history = state["identity"], [Epoch(**entry) for entry in state["history"]]
        except Exception as error:
            raise TrainingError(f"{path} is not a saved training state; delete it to start afresh") from error
        for key, value in self._identity().items():
            if identity.get(key) != value:
                raise TrainingError(
                    f"{path} is of another run: {key} is {identity.get(key)!r} there and {value!r} here; "
                    "use the same settings, or resume=False to start afresh"
                )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise TrainingError(
                f"{path} is of another model; use the same model, or resume=False to start afresh"
            ) from error
        self.history = history

    def _identity(self) -> dict[str, Any]:
        found = {"images": len(self.objective.inputs), "data": self.objective.name}
        return {**asdict(self.recipe), **found, **self.objective.identity}


def check_labels(model: nn.Module, inputs: Tensor, labels: Tensor, name: str) -> None:
    """Refuse images that the model rejects and labels without an output, before anything is trained."""
    classes = check_fits(model, inputs, name)
    if classes <= int(labels.max()):
        raise DataError(
            f"{name}: labels run up to {int(labels.max())} but the model's output for one image is "
            f"{(1, classes)}; give a model with an output per class"
        )


@contextmanager
def _seeded(seed: int, epoch: int) -> Iterator[torch.Generator]:
    """Seed the global generator (for dropout) inside the block only; yield one for order and crops."""
    value = seed * 1_000_003 + epoch
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(value)
        yield torch.Generator().manual_seed(value)


@contextmanager
def _bar(shown: bool, total: int, done: int) -> Iterator[Callable[[], None]]:
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=total, completed=done)
        yield lambda: bar.advance(task)
