"""``weldnet plane``: the loss on the plane through three networks."""

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

    from weldnet.evaluation import Plane

__all__ = ["plane"]


def plane(
    first: Annotated[Path, typer.Argument(metavar="A", help="The network at (0, 0).", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B", help="The network on the first axis.", show_default=False)],
    third: Annotated[Path, typer.Argument(metavar="C", help="The third network.", show_default=False)],
    model: ModelSpec,
    example_input: InputSpec,
    data: Data,
    split: Split = "test",
    points: Annotated[int, typer.Option("--points", min=2, help="Positions on each axis.")] = 9,
    margin: Annotated[
        float, typer.Option("--margin", min=0, help="How far the grid goes beyond the networks, as a share.")
    ] = 0.2,
    method: Method = "gamf",
    option: Options = None,
    outputs: Outputs = None,
    seed: Seed = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Measure the loss on the plane through A, and B and C aligned to A (--method identity leaves them as they are).

    Distances are between parameters. The grid of the loss is printed, with the networks' own; --json has more.
    """
    from weldnet.cli._early import check_data, check_method, check_options, require_files
    from weldnet.cli._specs import check_specs

    files = [first, second, third]
    require_files(files)
    check_specs(model, example_input)
    check_method(method)
    options = parse_options(option)
    check_options(method, options)
    check_data(data)
    from weldnet.alignment import describe
    from weldnet.cli._data import SAMPLES, load_labelled, load_unlabelled
    from weldnet.cli._method import check_device, choose_method
    from weldnet.cli._networks import align_networks, gather_networks
    from weldnet.evaluation import plane as measure

    chosen = choose_method(method, options, has_data=True)
    check_device(device, chosen)
    networks = gather_networks(model, files)
    images = load_labelled(data, split)
    unlabelled = load_unlabelled(data, SAMPLES) if chosen.needs_data else None
    with stray_prints_to_stderr():
        moved = align_networks(
            networks, example_input, chosen, outputs=parse_outputs(outputs), data=unlabelled, seed=seed, device=device
        )
        found = measure(*moved.values(), evaluate=images, points=points, margin=margin, device=device)
    if json:
        head = {"networks": list(networks), "data": data, "split": split, "method": repr(chosen)}
        print_json({**head, **found.to_dict()})
        return
    show(_table(found, f"loss on {data}, {split} split, aligned by {describe(chosen)}"))
    for name, (x, y), loss in zip(networks, found.corners, found.corner_values, strict=True):
        emit(f"{name} at x {x:.2f}, y {y:.2f}: loss {loss:.4f}")


def _table(found: Plane, title: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    table.add_column("y \\ x", justify="right")
    for x in found.x:
        table.add_column(f"{x:.2f}", justify="right")
    for y, row in reversed(list(zip(found.y, found.values, strict=True))):
        table.add_row(f"{y:.2f}", *(f"{value:.3f}" for value in row))
    return table
