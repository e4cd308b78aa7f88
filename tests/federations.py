"""A small federation, as a config, and what tests ask of its runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import weldnet
from weldnet.federated import MODEL, FederatedConfig, Federation, Order
from weldnet.records import FILE, Record, read

BASE: dict[str, Any] = {
    "dataset": "digits",
    "train_limit": 300,
    "model": "mlp",
    "model_options": {"sizes": [64, 10, 10]},
    "clients": 3,
    "rounds": 2,
    "local": {"epochs": 1, "batch_size": 16, "lr": 0.1},
}


def config(**changes: Any) -> FederatedConfig:
    return FederatedConfig.make({**BASE, **changes})


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "job.yaml"
    path.write_text(config(**changes).to_yaml())
    return path


def orders(federation: Federation, state: Mapping[str, Tensor], number: int) -> list[Order]:
    return [Order(client=client, round=number, state=state) for client in federation.chosen(number)]


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def same(a: Path, b: Path) -> bool:
    """Whether two runs ended with the same model, bit for bit."""
    return equal(weldnet.load(a / MODEL), weldnet.load(b / MODEL))


def rounds(out: Path) -> list[Record]:
    return read(out).of("round") if (out / FILE).exists() else []
