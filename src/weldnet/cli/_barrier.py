"""``weldnet barrier``: the loss between two networks, before and after alignment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

    from weldnet.evaluation import Barrier

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
    from weldnet.cli._early import check_data, check_method, check_options, require_files
    from weldnet.cli._specs import check_specs

    require_files([first, second])
    check_specs(model, example_input)
    check_method(method)
    options = parse_options(option)
    check_options(method, options)
    check_data(data)
    from weldnet.alignment import describe
    from weldnet.cli._data import SAMPLES, load_labelled, load_unlabelled
    from weldnet.cli._method import check_device, choose_method
    from weldnet.cli._networks import align_networks, gather_networks
    from weldnet.evaluation import barrier as measure

    chosen = choose_method(method, options, has_data=True)
    check_device(device, chosen)
    networks = gather_networks(model, [first, second])
    images = load_labelled(data, split)
    unlabelled = load_unlabelled(data, SAMPLES) if chosen.needs_data else None
    with stray_prints_to_stderr():
        a, b = networks.values()
        _, moved = align_networks(
            networks, example_input, chosen, outputs=parse_outputs(outputs), data=unlabelled, seed=seed, device=device
        ).values()
        before = measure(a, b, evaluate=images, points=points, device=device)
        after = measure(a, moved, evaluate=images, points=points, device=device)
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
    emit(f"barrier before alignment  {before.height:.4f}  area {before.area:.4f}")
    emit(f"barrier after alignment   {after.height:.4f}  area {after.area:.4f}  ({describe(chosen)})")


def _table(before: Barrier, after: Barrier, title: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for heading in ("t", "loss", "accuracy", "loss, aligned", "accuracy, aligned"):
        table.add_column(heading, justify="right")
    columns = (before.points, before.values, before.scores["accuracy"], after.values, after.scores["accuracy"])
    for t, *values in zip(*columns, strict=True):
        loss, accuracy, aligned_loss, aligned_accuracy = values
        table.add_row(f"{t:.3f}", f"{loss:.4f}", f"{accuracy:.2%}", f"{aligned_loss:.4f}", f"{aligned_accuracy:.2%}")
    return table
