"""``weldnet barrier``: the loss between two networks, before and after alignment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weldnet.cli._common import (
    Data,
    Device,
    InputSpec,
    Json,
    Method,
    ModelSpec,
    Options,
    Outputs,
    Seed,
    Split,
    emit,
    parse_options,
    parse_outputs,
    print_json,
    show,
    stray_prints_to_stderr,
)

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from weldnet.evaluation import Labelled

__all__ = ["barrier"]


def barrier(
    first: Annotated[Path, typer.Argument(metavar="A", help="The network at t = 0.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B", help="The network at t = 1.", show_default=False)],
    model: ModelSpec,
    example_input: InputSpec,
    data: Data,
    split: Split = "test",
    points: Annotated[int, typer.Option("--points", min=2, help="Positions on the line, both ends included.")] = 25,
    method: Method = "gamf",
    option: Options = None,
    outputs: Outputs = None,
    seed: Seed = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Measure loss and accuracy on the straight line from A to B, and from A to B aligned to A.

    Checkpoints may be .safetensors, .pt, .pth, .bin, .ckpt, an .index.json, or a folder with one of them.
    """
    from weldnet.cli._early import check_data, check_method, require_files

    require_files([first, second])
    check_method(method)
    check_data(data)
    from weldnet.alignment import describe
    from weldnet.cli._data import load_labelled
    from weldnet.cli._method import check_device, choose_method
    from weldnet.cli._networks import gather_networks

    chosen = choose_method(method, parse_options(option))
    check_device(device)
    networks = gather_networks(model, [first, second])
    images = load_labelled(data, split)
    with stray_prints_to_stderr():
        a, b, moved = _aligned(networks, example_input, parse_outputs(outputs), chosen, seed, device)
        before = _measure(a, b, images, points, device)
        after = _measure(a, moved, images, points, device)
    if json:
        print_json(
            {
                "networks": list(networks),
                "data": data,
                "split": split,
                "method": repr(chosen),
                "before": before.to_dict(),
                "after": after.to_dict(),
            }
        )
        return
    show(_table(before, after, f"{' to '.join(networks)} on {data}, {split} split"))
    emit(f"barrier before alignment  {before.height:.4f}")
    emit(f"barrier after alignment   {after.height:.4f}  ({describe(chosen)})")


@dataclass(frozen=True)
class _Curve:
    """What was measured on one line; ``height`` is the barrier of the loss."""

    points: tuple[float, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]
    height: float

    def to_dict(self) -> dict[str, Any]:
        """Return the curve as plain data."""
        return {"points": self.points, "loss": self.loss, "accuracy": self.accuracy, "barrier": self.height}


def _aligned(
    networks: dict[str, nn.Module], spec: str, outputs: list[str] | None, method: Any, seed: int, device: str | None
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return A, B, and B carried to A's order of units."""
    import copy

    from weldnet.alignment import align, transport
    from weldnet.checkpoints import load_into
    from weldnet.cli._input import make_input
    from weldnet.structure import capture, check

    (name_a, a), (name_b, b) = networks.items()
    example_input = make_input(spec, a, seed=seed)
    structure = capture(a, example_input, outputs)
    check(b, make_input(spec, b, seed=seed), structure, seed=seed)
    alignment = align(networks, structure, method=method, seed=seed, device=device).relative_to(name_a)
    moved = copy.deepcopy(b)
    load_into(moved, transport(b.state_dict(), structure, alignment[name_b]), name_b)
    return a, b, moved


def _measure(a: nn.Module, b: nn.Module, images: Labelled, points: int, device: str | None) -> _Curve:
    from weldnet.evaluation import barrier, evaluate

    accuracy: list[float] = []

    def loss(network: nn.Module) -> float:
        found = evaluate(network, images, device=device)
        accuracy.append(found.accuracy)
        return found.loss

    line = barrier(a, b, evaluate=loss, points=points)
    return _Curve(line.points, line.values, tuple(accuracy), line.height)


def _table(before: _Curve, after: _Curve, title: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for heading in ("t", "loss", "accuracy", "loss, aligned", "accuracy, aligned"):
        table.add_column(heading, justify="right")
    columns = (before.points, before.loss, before.accuracy, after.loss, after.accuracy)
    for t, *values in zip(*columns, strict=True):
        loss, accuracy, aligned_loss, aligned_accuracy = values
        table.add_row(f"{t:.3f}", f"{loss:.4f}", f"{accuracy:.2%}", f"{aligned_loss:.4f}", f"{aligned_accuracy:.2%}")
    return table
