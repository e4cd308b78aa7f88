"""``weldnet finetune`` and ``weldnet distil``: a short training after fusing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from typer.core import TyperCommand

from weldnet.cli._common import Data, Device, Json, ModelSpec, Seed, Written, emit, interactive, print_json

if TYPE_CHECKING:
    from torch import nn

    from weldnet.training import TrainingResult

__all__ = ["Distil", "distil", "finetune"]

Fused = Annotated[Path, typer.Argument(metavar="FUSED", help="The fused network.", show_default=False)]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Where the result goes.")]
Lr = Annotated[float, typer.Option("--lr", help="The peak learning rate.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images per step.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from OUT.state, if it is there.")]


def finetune(
    fused: Fused,
    model: ModelSpec,
    data: Data,
    output: Output,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the training images.")] = 1,
    lr: Lr = 1e-3,
    batch_size: BatchSize = 128,
    resume: Resume = False,
    seed: Seed = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Train a fused network on the labelled train split, shortly.

    After every epoch the state is kept in OUT.state, for --resume; it is removed when the network is written.
    """
    _check([fused], model, data=data, output=output, resume=resume)
    from weldnet.cli._data import load_labelled
    from weldnet.training import Recipe, fine_tune

    recipe = Recipe(epochs=epochs, lr=lr, batch_size=batch_size, seed=seed)
    network = _load(model, [fused], device)[0]
    labelled = load_labelled(data, "train")

    def work(state: Path) -> TrainingResult:
        return fine_tune(
            network, labelled, recipe, device=device, state_path=state, resume=resume, progress=interactive()
        )

    config = {"made_by": "finetune", "model": model, "data": data, "recipe": asdict(recipe)}
    _finish(work, [fused], [network], output=output, data=data, config=config, resume=resume, device=device, json=json)


def distil(
    fused: Fused,
    parents: Annotated[
        list[Path],
        typer.Option("--parents", metavar="A [B ...]", help="The networks whose ensemble teaches.", show_default=False),
    ],
    model: ModelSpec,
    data: Data,
    output: Output,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the images.")] = 3,
    lr: Lr = 1e-3,
    batch_size: BatchSize = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="Above 1, small probabilities count more.")] = 1.0,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Unlabelled train images at most.")] = 10_000,
    resume: Resume = False,
    seed: Seed = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Train a fused network towards the ensemble of its parents, on the train split without its labels.

    The labels of the test split only score the result. After every epoch the state is kept in OUT.state, for --resume.
    """
    _check([fused, *parents], model, data=data, output=output, resume=resume)
    from weldnet.cli._data import load_unlabelled
    from weldnet.training import Recipe
    from weldnet.training import distil as run

    recipe = Recipe(epochs=epochs, lr=lr, batch_size=batch_size, seed=seed)
    networks = _load(model, [fused, *parents], device)
    inputs = load_unlabelled(data, samples)

    def work(state: Path) -> TrainingResult:
        return run(
            networks[0],
            networks[1:],
            inputs,
            recipe,
            temperature=temperature,
            device=device,
            state_path=state,
            resume=resume,
            progress=interactive(),
        )

    settings = {"temperature": temperature, "samples": len(inputs), "recipe": asdict(recipe)}
    config = {"made_by": "distil", "model": model, "data": data, **settings}
    files = [fused, *parents]
    _finish(work, files, networks, output=output, data=data, config=config, resume=resume, device=device, json=json)


class Distil(TyperCommand):
    """Reads ``--parents A B C`` as ``--parents A --parents B --parents C``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give every word after ``--parents``, up to the next option, an option of its own."""
        words: list[str] = []
        inside = False
        for word in args:
            inside = word == "--parents" or (inside and not word.startswith("-"))
            if inside and word != "--parents":
                words.append("--parents")
            if word != "--parents":
                words.append(word)
        if "--parents" in args and "--parents" not in words:
            raise click.UsageError("--parents names no file; give the networks whose ensemble teaches", ctx)
        return super().parse_args(ctx, words)


def _check(files: list[Path], model: str, *, data: str, output: Path, resume: bool) -> None:
    """Refuse what cannot be meant, before torch is imported."""
    from weldnet.cli._early import (
        WRITTEN_SUFFIXES,
        check_data,
        refuse_overwriting,
        refuse_suffix,
        refuse_unfinished,
        require_files,
    )
    from weldnet.cli._specs import check_specs
    from weldnet.cli._train import state_of

    require_files(files)
    check_specs(model)
    check_data(data)
    refuse_unfinished(state_of(output), resume)
    refuse_suffix(output, WRITTEN_SUFFIXES)
    refuse_overwriting([output], files)
    from weldnet.checkpoints import check_writable

    check_writable(output)


def _load(model: str, files: list[Path], device: str | None) -> list[nn.Module]:
    from weldnet.cli._method import check_device
    from weldnet.cli._networks import gather_networks

    check_device(device)
    return list(gather_networks(model, files).values())


def _finish(
    work: Callable[[Path], TrainingResult],
    files: list[Path],
    networks: list[nn.Module],
    *,
    output: Path,
    data: str,
    config: dict[str, Any],
    resume: bool,
    device: str | None,
    json: bool,
) -> None:
    """Run, score before and after on the test split, save with provenance, and say what came out."""
    from weldnet.checkpoints import provenance, save
    from weldnet.cli._data import load_labelled
    from weldnet.cli._train import keeping_state
    from weldnet.evaluation import evaluate_together

    written = Written.soon(output)
    test = load_labelled(data, "test")
    with keeping_state(output, resume) as state:
        result = work(state)
    found = evaluate_together([networks[0], result.model], test, device=device)
    before, after = (asdict(metrics) for metrics in found.metrics)
    metadata = provenance(files, {**config, "test": after}, result.recipe.seed)
    save(result.model.state_dict(), output, metadata=metadata)
    state.unlink(missing_ok=True)
    if json:
        history = [asdict(epoch) for epoch in result.history]
        print_json({"output": output, **config, "before": before, "after": after, "history": history})
    else:
        for word, scores in (("before", before), ("after", after)):
            emit(f"{word:6} accuracy {scores['accuracy']:.2%}, loss {scores['loss']:.4f} on the test split")
        emit(f"{result.seconds:.1f} s of training")
    written.say()
