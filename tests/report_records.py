"""Made-up records of every kind, shaped as those of real studies; no number in them was measured."""

from __future__ import annotations

import math
import random
from typing import Any

from weldnet.records import Record

WHERE = {
    "weldnet": "0.1.0",
    "commit": "0123456789ab",
    "torch": "2.13.0",
    "python": "3.11.7",
    "machine": "Example CPU @ 2.00GHz",
    "cores": 2,
    "threads": 1,
}
SOURCE = "An Example Paper (2022), table 2"
LAYERS = ("features.0", "features.3", "features.6", "features.8", "features.11", "features.13", "classifier")
METHODS = {
    "individual": 90.2,
    "best parent": 90.6,
    "ensemble": 91.4,
    "naive": 17.1,
    "gamf": 86.9,
    "optimal_transport": 85.4,
    "weight_matching": 84.1,
    "activation_matching": 86.0,
}


def study() -> list[Record]:
    """A study with results of two settings, published numbers, curves, couplings, networks and federated rounds."""
    draw = random.Random(0)
    records = [_run()]
    for partition, loss in (("iid", 0.0), ("dirichlet 0.5", 6.0)):
        for networks in (2, 4):
            records += _published(partition, networks)
            for group in range(5):
                records += _results(draw, partition, networks, group, loss)
        records += _networks(draw, partition)
        records += _curves(draw, partition)
    records += _couplings(draw)
    records += _rounds(draw)
    records += _published_rounds()
    return records


def _run() -> Record:
    return Record(
        kind="run",
        extra={
            "title": "CIFAR-10, VGG11: made-up numbers",
            "table": "cifar10-vgg11",
            "scale": "cpu",
            "command": "weldnet reproduce cifar10-vgg11 --scale cpu -o runs/example",
            "protocol": {"architecture": "vgg11?bias=false", "epochs": 20, "optimizer": "sgd", "seeds": [0, 1, 2, 3]},
            "notes": ["Every number on this page is made up.", "Repairs read 512 unlabelled training images."],
        },
        where=WHERE,
        time="2026-01-01T10:00:00+00:00",
    )


def _cell(partition: str, networks: int | None = None, **more: Any) -> dict[str, Any]:
    cell = {"dataset": "cifar10", "partition": partition, "architecture": "vgg11?bias=false"}
    return {**cell, **({"networks": networks} if networks else {}), **more}


def _published(partition: str, networks: int) -> list[Record]:
    less = 6.0 * (networks - 2)
    numbers = {
        "individual": 90.31,
        "naive": 17.02,
        "ensemble": 91.63,
        "optimal_transport": 85.98 - less,
        "gamf": 87.5 - less,
    }
    found = [
        Record(
            kind="published",
            cell=_cell(partition, networks, method=method, stage="one-shot"),
            values={"accuracy": round(number / 100, 4)},
            source=SOURCE,
        )
        for method, number in numbers.items()
    ]
    tuned = {"naive": 90.0, "optimal_transport": 90.7, "gamf": 91.1}
    return found + [
        Record(
            kind="published",
            cell=_cell(partition, networks, method=method, stage="fine-tuned"),
            values={"accuracy": number / 100},
            source="Another Example Paper (2020), table 1",
        )
        for method, number in tuned.items()
    ]


def _results(draw: random.Random, partition: str, networks: int, group: int, loss: float) -> list[Record]:
    found: list[Record] = []
    for method, number in METHODS.items():
        single = method in ("individual", "best parent", "ensemble")
        repairs = ("none",) if single else ("none", "refit")
        for repair in repairs:
            less = 0.0 if single else (5.0 * (networks - 2) + loss) * (0.5 if repair == "refit" else 1.0)
            gain = 2.0 if repair == "refit" else 0.0
            stages = ("one-shot",) if single or repair == "refit" else ("one-shot", "fine-tuned")
            for stage in stages:
                accuracy = number - less + gain if stage == "one-shot" else 90.5 + number / 100
                found.append(
                    _result(
                        draw,
                        _cell(partition, networks, group=group, method=method, repair=repair, stage=stage),
                        accuracy,
                    )
                )
    if group == 4 and networks == 4:
        failed = _cell(partition, networks, group=group, method="frank_wolfe", repair="none", stage="one-shot")
        found.append(
            Record(kind="result", cell=failed, extra={"error": "out of memory: 12 GB are needed"}, where=WHERE)
        )
    return found


def _result(draw: random.Random, cell: dict[str, Any], accuracy: float) -> Record:
    shown = (accuracy + draw.gauss(0, 0.5)) / 100
    fused = cell["method"] not in ("individual", "best parent", "ensemble")
    repaired = cell["repair"] == "refit"
    values: dict[str, float | None] = {
        "accuracy": shown,
        "loss": 0.3 - math.log(max(shown, 0.05)),
        "calibration_error": 0.02 + 0.2 * (1 - shown),
    }
    extra: dict[str, Any] = {}
    if fused:
        values |= {
            "barrier": 2.5 * (1 - shown),
            "seconds": 3 + 4 * draw.random() + (5 if repaired else 0),
            "memory": 4e7 + 1e7 * draw.random(),
            "samples": 512 if repaired else 0,
        }
        before = [0.95 - 0.1 * index * (0.6 if cell["method"] == "gamf" else 1.0) for index in range(len(LAYERS))]
        after = [0.97 + 0.02 * draw.random() if repaired else value for value in before]
        extra["variances"] = {layer: [b, a] for layer, b, a in zip(LAYERS, before, after, strict=True)}
        if cell["method"] == "gamf" and not repaired:
            extra["spaces"] = [
                {
                    "space": f"features.{i}",
                    "units": 64 * 2**i,
                    "moved": 0.98,
                    "quality": 0.7 - 0.1 * i,
                    "unaligned": 0.02,
                    "cost": 0.3 + 0.1 * i,
                }
                for i in range(3)
            ]
    return Record(kind="result", cell=cell, values=values, extra=extra, seed=cell["group"], where=WHERE)


def _networks(draw: random.Random, partition: str) -> list[Record]:
    found: list[Record] = []
    for seed in range(8):
        history = [
            {
                "epoch": e + 1,
                "loss": 2.3 * math.exp(-e / 5) + 0.1 * draw.random(),
                "accuracy": 0.9 - 0.8 * math.exp(-e / 4),
            }
            for e in range(20)
        ]
        cell = _cell(partition, seed=seed)
        found.append(Record(kind="network", cell=cell, values={"accuracy": 0.9}, extra={"history": history}, seed=seed))
    return found


def _curves(draw: random.Random, partition: str) -> list[Record]:
    found: list[Record] = []
    x = [index / 20 for index in range(21)]
    for method, height in (("naive", 2.0), ("weight_matching", 0.5), ("gamf", 0.35)):
        for group in range(3):
            high = height * (1 + 0.2 * draw.random())
            rise = [4 * t * (1 - t) for t in x]
            y = {"loss": [0.4 + high * r for r in rise], "accuracy": [0.9 - 0.35 * min(high, 2) * r for r in rise]}
            found.append(
                Record(kind="curve", cell=_cell(partition, 2, method=method, group=group), extra={"x": x, "y": y})
            )
    return found


def _couplings(draw: random.Random) -> list[Record]:
    permutations = {f"features.{i}": draw.sample(range(n), n) for i, n in enumerate((16, 64, 128, 300))}
    soft = [[math.exp(-0.3 * abs(a - u)) / 6 for u in range(24)] for a in range(24)]
    return [
        Record(kind="couplings", cell=_cell("iid", 2, method="gamf", group=0), extra={"spaces": permutations}),
        Record(
            kind="couplings",
            cell=_cell("iid", 2, method="optimal_transport", group=0),
            extra={"spaces": {"features.0": soft}},
        ),
    ]


def _rounds(draw: random.Random) -> list[Record]:
    found: list[Record] = []
    runs = {
        ("fedavg", "sgd", "common"): 0.0,
        ("gamf", "sgd", "common"): 0.01,
        ("gamf", "moon", "common"): 0.03,
        ("gamf", "sgd", "different"): -0.05,
    }
    for seed in range(3):
        easy = 0.05 * draw.random()
        for (rule, algorithm, initialisation), gain in runs.items():
            for number in range(1, 13):
                accuracy = 0.3 + 0.45 * (1 - math.exp(-number / 4)) + easy + gain + 0.01 * draw.random()
                cell = {
                    "dataset": "cifar10",
                    "partition": "dirichlet 0.5",
                    "architecture": "vgg11",
                    "clients": 5,
                    "rule": rule,
                    "algorithm": algorithm,
                    "initialisation": initialisation,
                    "seed": seed,
                    "round": number,
                }
                values = {
                    "accuracy": accuracy,
                    "loss": 2 - accuracy,
                    "moved": 0.9 / number if rule == "gamf" else 0.0,
                    "bytes": 4.2e6 * (2 if algorithm == "moon" else 1),
                    "seconds": 12.0,
                    "missing": 0,
                }
                found.append(Record(kind="round", cell=cell, values=values, seed=seed, where=WHERE))
    return found


def _published_rounds() -> list[Record]:
    table = {("fedavg", "sgd"): (0.81, 0.70), ("gamf", "sgd"): (0.828, 0.724), ("fedma", "sgd"): (0.8146, 0.7029)}
    return [
        Record(
            kind="published",
            cell={
                "dataset": "cifar10",
                "partition": "dirichlet 0.5",
                "rule": rule,
                "algorithm": algorithm,
                "clients": clients,
            },
            values={"accuracy": number},
            source="A Third Example Paper (2024), table 3",
        )
        for (rule, algorithm), numbers in table.items()
        for clients, number in zip((5, 10), numbers, strict=True)
    ]
