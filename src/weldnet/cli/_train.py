"""``weldnet train``: one network from a seed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weldnet.cli._common import Data, Device, Json, ModelSpec, Seed, Written, emit, interactive, print_json, say

if TYPE_CHECKING:
    from weldnet.training import Recipe, TrainingResult

__all__ = ["keeping_state", "state_of", "train"]


def train(
    model: ModelSpec,
    data: Data,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Where the trained network goes.")],
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the training images.")] = 10,
    lr: Annotated[float, typer.Option("--lr", help="The peak learning rate.")] = 1e-3,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images per step.")] = 128,
    optimizer: Annotated[str, typer.Option("--optimizer", help="adam or sgd.")] = "adam",
    schedule: Annotated[str, typer.Option("--schedule", help="cosine, onecycle or constant.")] = "cosine",
    augment: Annotated[str, typer.Option("--augment", help="none or crop-flip.")] = "none",
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="Pulls the weights to zero.")] = 0.0,
    precision: Annotated[str, typer.Option("--precision", help="float32 or bfloat16.")] = "float32",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT.state, if it is there.")] = False,
    seed: Seed = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Train one network; the seed decides its initial weights and the order of the data.

    After every epoch the state is kept in OUT.state, for --resume; it is removed when the network is written.
    """
    from weldnet.cli._early import WRITTEN_SUFFIXES, check_data, refuse_suffix, refuse_unfinished
    from weldnet.cli._specs import check_specs

    refuse_suffix(output, WRITTEN_SUFFIXES)
    check_data(data)
    check_specs(model)
    refuse_unfinished(state_of(output), resume)
    from weldnet.checkpoints import check_writable
    from weldnet.cli._method import check_device
    from weldnet.training import Recipe

    recipe = Recipe(
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        optimizer=optimizer,  # pyright: ignore[reportArgumentType]  (the recipe says what it knows)
        schedule=schedule,  # pyright: ignore[reportArgumentType]
        augment=augment,  # pyright: ignore[reportArgumentType]
        precision=precision,  # pyright: ignore[reportArgumentType]
        weight_decay=weight_decay,
        seed=seed,
    )
    check_device(device)
    check_writable(output)
    written = Written.soon(output)
    result, score = _train(model, data, output, recipe, resume, device)
    if json:
        history = [asdict(epoch) for epoch in result.history]
        print_json({"output": output, "recipe": asdict(recipe), "test": score, "history": history})
    else:
        emit(f"test accuracy {score['accuracy']:.2%}, loss {score['loss']:.4f}, {result.seconds:.1f} s of training")
    written.say()


def _train(
    model: str, data: str, output: Path, recipe: Recipe, resume: bool, device: str | None
) -> tuple[TrainingResult, dict[str, Any]]:
    from weldnet.checkpoints import provenance, save
    from weldnet.cli._data import load_split
    from weldnet.cli._model import build_model
    from weldnet.evaluation import evaluate
    from weldnet.training import train

    network = build_model(model, seed=recipe.seed)
    images, test = load_split(data, "train"), load_split(data, "test")
    with keeping_state(output, resume) as state:
        result = train(network, images, recipe, device=device, state_path=state, resume=resume, progress=interactive())
    score = asdict(evaluate(result.model, test, device=device))
    config = {"model": model, "data": data, "recipe": asdict(recipe), "test": score}
    save(result.model.state_dict(), output, metadata=provenance([], config, recipe.seed))
    state.unlink(missing_ok=True)
    return result, score


@contextlib.contextmanager
def keeping_state(output: Path, resume: bool) -> Iterator[Path]:
    """Yield the file of a run's state; say what epochs give, and after an interrupt how to go on."""
    from weldnet.errors import TrainingError

    state = state_of(output)
    if resume and not state.exists():
        say(f"there is no {state} to go on from; starting afresh", kind="note")
    try:
        with _epochs_as_lines():
            yield state
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*_way_on(state)) from None
    except TrainingError as error:
        raise TrainingError(str(error).replace("or resume=False to", "or remove that file to")) from error


def state_of(output: Path) -> Path:
    """Return where the state of an unfinished training is kept."""
    return output.with_name(f"{output.name}.state")


def _way_on(state: Path) -> list[str]:
    """Say how to go on after an interrupt, if an epoch was finished before."""
    return [f"go on with --resume, the state is in {state}"] if state.exists() else []


class _Lines(logging.Handler):
    """Says one line for each epoch that the training logs."""

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple) and len(record.args) == 3:
            number, epochs, epoch = record.args
            say(f"epoch {number}/{epochs}  loss {epoch.loss:.4f}  accuracy {epoch.accuracy:.2%}")  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def _epochs_as_lines() -> Iterator[None]:
    log, lines = logging.getLogger("weldnet.training._run"), _Lines(logging.INFO)
    level = log.level
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(lines)
        log.setLevel(level)
