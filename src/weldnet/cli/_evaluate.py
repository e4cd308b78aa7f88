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
    """Measure accuracy, loss and calibration error of networks on labelled images, and how often they agree.

    Checkpoints may be .safetensors, .pt, .pth, .bin, .ckpt, an .index.json, or a folder with one of them.
    """
    from weldnet.cli._early import check_data, require_files
    from weldnet.cli._specs import check_specs

    require_files(checkpoints)
    check_specs(model)
    check_data(data)
    from weldnet.cli._data import load_labelled
    from weldnet.cli._method import check_device
    from weldnet.cli._networks import gather_networks
    from weldnet.evaluation import evaluate_together

    check_device(device)
    networks = gather_networks(model, checkpoints)
    images = load_labelled(data, split)
    found = evaluate_together(list(networks.values()), images, device=device)
    scores = dict(zip(networks, found.metrics, strict=True))
    agreement = {
        name: dict(zip(networks, row, strict=True)) for name, row in zip(networks, found.agreement, strict=True)
    }
    if json:
        named = [
            {"name": name, **asdict(metrics), "agreement": agreement[name], "agreement_with_ensemble": share}
            for (name, metrics), share in zip(scores.items(), found.with_ensemble, strict=True)
        ]
        together = asdict(found.ensemble) if ensemble else None
        print_json({"data": data, "split": split, "networks": named, "ensemble": together})
        return
    show(_table({**scores, "ensemble": found.ensemble} if ensemble else scores, f"{data}, {split} split"))
    if ensemble:
        for name, share in zip(networks, found.with_ensemble, strict=True):
            agreement[name]["ensemble"] = share
    if len(networks) > 1 or ensemble:
        show(_agreement_table(agreement))


def _table(scores: Mapping[str, Metrics], title: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("network")
    for heading in ("accuracy", "loss", "calibration error", "samples"):
        table.add_column(heading, justify="right")
    for name, found in scores.items():
        table.add_row(
            name, f"{found.accuracy:.2%}", f"{found.loss:.4f}", f"{found.calibration_error:.4f}", str(found.samples)
        )
    return table


def _agreement_table(agreement: Mapping[str, Mapping[str, float]]) -> Table:
    from rich import box
    from rich.table import Table

    others = list(next(iter(agreement.values())))
    table = Table(box=box.SIMPLE_HEAD, title="share of samples with the same answer", title_justify="left")
    table.add_column("network")
    for name in others:
        table.add_column(name, justify="right")
    for name, shares in agreement.items():
        table.add_row(name, *(f"{shares[other]:.2%}" for other in others))
    return table
