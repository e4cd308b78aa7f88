"""``weldnet evaluate``: how good networks are."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from weldnet.cli._common import Checkpoints, Data, Device, Json, ModelSpec, Split, print_json, show

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from weldnet.evaluation import Metrics

__all__ = ["evaluate"]


def evaluate(
    checkpoints: Checkpoints,
    model: ModelSpec,
    data: Data,
    split: Split = "test",
    ensemble: Annotated[bool, typer.Option("--ensemble", help="Also score the average of their predictions.")] = False,
    device: Device = None,
    json: Json = False,
) -> None:
    """Measure the accuracy and the loss of networks on labelled images.

    Checkpoints may be .safetensors, .pt, .pth, .bin, .ckpt, an .index.json, or a folder with one of them.
    """
    from weldnet.cli._early import check_data, require_files

    require_files(checkpoints)
    check_data(data)
    from weldnet.cli._data import load_labelled
    from weldnet.cli._method import check_device
    from weldnet.cli._networks import gather_networks
    from weldnet.evaluation import ensemble_metrics
    from weldnet.evaluation import evaluate as measure

    check_device(device)
    networks = gather_networks(model, checkpoints)
    images = load_labelled(data, split)
    scores = {name: measure(network, images, device=device) for name, network in networks.items()}
    together = ensemble_metrics(list(networks.values()), images, device=device) if ensemble else None
    if json:
        named = [{"name": name, **asdict(found)} for name, found in scores.items()]
        print_json(
            {"data": data, "split": split, "networks": named, "ensemble": None if not together else asdict(together)}
        )
        return
    show(_table(scores if together is None else {**scores, "ensemble": together}, f"{data}, {split} split"))


def _table(scores: Mapping[str, Metrics], title: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("network")
    for heading in ("accuracy", "loss", "samples"):
        table.add_column(heading, justify="right")
    for name, found in scores.items():
        table.add_row(name, f"{found.accuracy:.2%}", f"{found.loss:.4f}", str(found.samples))
    return table
