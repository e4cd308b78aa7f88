"""Every method with every repair on the same trained networks: what to fuse with.

Trained networks come from ``studies/train_networks.py``. For every set and every group of 2, 4 or 8 networks,
``weldnet.compare`` aligns once with each method and repairs in every way, from 512 unlabelled training images (evenly
spaced over the whole training set, so that with split data they come from all parents' parts). Scores are test
accuracy: on all test images of MNIST, on 5,000 evenly spaced ones of CIFAR-10. All methods are tried on pairs without
BatchNorm; groups of four and eight, and networks with BatchNorm, get the seven of ``FEW``, and with BatchNorm only two
methods the repair ``synthetic``, whose inputs take a minute to make. Appends one JSON line for each combination and
skips what is there.

    python studies/toolbox_study.py --out docs/results/toolbox.jsonl
    python studies/toolbox_study.py --out docs/results/toolbox.jsonl --table docs/results/toolbox.md
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from records import provenance
from torch import nn

import weldnet
from weldnet import checkpoints, data, models
from weldnet.alignment import METHODS, AlignmentMethod, make_method
from weldnet.fusion import Comparison

_log = logging.getLogger("toolbox")

REPAIRS = ("none", "weights", "synthetic", "data", "refit")
ALL = ("identity", *(name for name in METHODS if name != "identity"), "gamf activations=1.0")
FEW = (
    "identity",
    "weight_matching",
    "merge_many",
    "optimal_transport",
    "activation_matching",
    "gamf",
    "gamf activations=1.0",
)


def plan(family: Family, size: int) -> list[tuple[Sequence[str], Sequence[str]]]:
    """Which methods get which repairs."""
    if family.batch_norm:
        return [(FEW, ("none", "weights", "data", "refit")), (("identity", "gamf"), ("synthetic",))]
    return [(ALL if size == 2 else FEW, REPAIRS)]


def make(label: str) -> AlignmentMethod:
    """Return the method that a label of the table stands for."""
    name, *options = label.split()
    return make_method(name, **{key: float(value) for key, value in (option.split("=") for option in options)})


@dataclass(frozen=True)
class Family:
    """Trained networks of one architecture, under one or more splits of the training data."""

    name: str
    dataset: str
    model: str
    options: dict[str, Any]
    test: int | None = 5000
    batch_norm: bool = False

    def build(self) -> nn.Module:
        return models.build(self.model, **self.options)


FAMILIES = (
    Family("mnist-mlp", "mnist", "mlp", {}, None),
    Family("cifar10-vgg11q", "cifar10", "vgg11", {"width": 0.25, "batch_norm": False, "bias": False}),
    Family("cifar10-vgg11bnh", "cifar10", "vgg11", {"width": 0.5, "batch_norm": True}, batch_norm=True),
    Family("cifar10-resnet20", "cifar10", "resnet20", {}, batch_norm=True),
)
SIZES = (2, 4, 8)


def groups(nets: Path, family: Family, most: int) -> Iterator[tuple[str, tuple[Path, ...]]]:
    """Yield the kind of split and the files of every group: disjoint ones, at most so many of each size."""
    for size in SIZES:
        for scheme in ("iid", "dirichlet", "skew"):
            folder = nets / (family.name if scheme == "iid" else f"{family.name}-{scheme}{size}")
            files = sorted(folder.glob("seed*.safetensors"), key=lambda file: int(file.stem[4:]))
            whole = [tuple(files[i : i + size]) for i in range(0, len(files) - size + 1, size)]
            for group in whole[:most]:
                yield scheme, group


def run(nets: Path, out: Path, families: list[str], sizes: list[int], most: int) -> None:
    """Compare on every group that is not in the records yet."""
    lines = out.read_text().splitlines() if out.exists() else []
    done = {(r["family"], r["scheme"], r["networks"], r["method"], r["repair"]) for r in map(json.loads, lines)}
    for family in FAMILIES:
        if families and family.name not in families:
            continue
        test = data.load(family.dataset, split="test", limit=family.test)
        unlabelled = data.load(family.dataset, split="train", limit=512).images
        for scheme, files in groups(nets, family, most):
            if len(files) not in sizes:
                continue
            names = ",".join(file.stem for file in files)
            for methods, repairs in plan(family, len(files)):
                missing = [m for m in methods if any((family.name, scheme, names, m, r) not in done for r in repairs)]
                if not missing:
                    continue
                _log.info("%s %s %s: %s", family.name, scheme, names, ", ".join(missing))
                start = time.process_time()
                found = weldnet.compare(
                    {file.stem: _load(family, file) for file in files},
                    test.images[:1],
                    methods=[make(method) for method in missing],
                    repairs=repairs,
                    evaluate_on=test,
                    data=unlabelled,
                    points=0,
                    progress=False,
                )
                _log.info("%.0f CPU s", time.process_time() - start)
                shared = {
                    "family": family.name,
                    "scheme": scheme,
                    "size": len(files),
                    "networks": names,
                    **provenance(),
                }
                _append(out, shared, found, done, missing)


def _append(
    out: Path, shared: dict[str, Any], found: Comparison, done: set[tuple[str, ...]], methods: Sequence[str]
) -> None:
    report = found.to_dict()
    references = report["references"]
    parents = [r["scores"]["accuracy"] for r in references if r["role"] == "parent"]
    ensemble = next(r["scores"]["accuracy"] for r in references if r["role"] == "ensemble")
    with out.open("a") as file:
        for number, row in enumerate(report["rows"]):
            row["method"] = methods[number * len(methods) // len(report["rows"])]
            if (shared["family"], shared["scheme"], shared["networks"], row["method"], row["repair"]) in done:
                continue
            file.write(json.dumps({**shared, "parents": parents, "ensemble": ensemble, **row}, default=str) + "\n")


def _load(family: Family, file: Path) -> nn.Module:
    model = family.build().eval()
    checkpoints.load_into(model, checkpoints.load(file), file.stem)
    return model


def table(out: Path, target: Path) -> None:
    """Write means over groups as Markdown, one table for each set, split and number of networks."""
    records = [json.loads(line) for line in out.read_text().splitlines()]
    cells: dict[tuple[str, str, int], dict[tuple[str, str], list[dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for record in records:
        key = (record["family"], record["scheme"], record["size"])
        cells[key][record["method"], record["repair"]].append(record)
    commits = ", ".join(sorted({record["commit"] for record in records}))
    lines = [
        "# Every method with every repair",
        "",
        "Measured by us: `python studies/toolbox_study.py` (its docstring says how; the networks are those of",
        "`studies/train_networks.py`). Test accuracy in %, mean (deviation) over groups of networks; one-shot,",
        "nothing is fine-tuned. `data` and `refit`, `activation_matching`, `straight_through`, `sinkhorn_rebasin` and",
        "`gamf activations=1.0` see 512 unlabelled training images, the others none. Seconds: clock time to align,",
        "transport and average, on a busy machine.",
        f"CIFAR-10 is a JPEG copy, scored on 5,000 test images. Records: `{out.name}`; commits {commits},",
        f"PyTorch {records[0]['torch']}, {records[0]['machine']}.",
        "`weight_matching`, `merge_many` and `straight_through` are those of before `weight-matching.md`: with",
        "BatchNorm they counted running statistics, and two networks started from the identity.",
    ]
    for (family, scheme, size), by_cell in sorted(cells.items(), key=lambda item: _order(item[0])):
        any_cell = max(by_cell.values(), key=len)
        parents = [100 * p for r in any_cell for p in r["parents"]]
        ensemble = [100 * r["ensemble"] for r in any_cell]
        lines += [
            "",
            f"## {family}, {scheme}, {size} networks ({len(any_cell)} groups)",
            "",
            f"Parents {spread(parents)}, ensemble {spread(ensemble)}.",
            "",
            "| method | " + " | ".join(REPAIRS) + " | seconds |",
            "|---|" + "---|" * (len(REPAIRS) + 1),
        ]
        best = max((_mean(rows) for rows in by_cell.values()), default=0.0)
        for method in ALL:
            rows = {repair: by_cell.get((method, repair), []) for repair in REPAIRS}
            if not any(rows.values()):
                continue
            shown = [_cell(rows[repair], best) for repair in REPAIRS]
            label = "identity (naive)" if method == "identity" else method
            lines.append(f"| {label} | " + " | ".join(shown) + f" | {_seconds(rows['none'])} |")
    target.write_text("\n".join(lines) + "\n")


def _order(key: tuple[str, str, int]) -> tuple[int, int, str]:
    family, scheme, size = key
    return [f.name for f in FAMILIES].index(family), size, {"iid": "0"}.get(scheme, scheme)


def _scores(rows: list[dict[str, Any]]) -> list[float]:
    return [100 * r["scores"]["accuracy"] for r in rows if r.get("scores")]


def _mean(rows: list[dict[str, Any]]) -> float:
    scores = _scores(rows)
    return statistics.mean(scores) if scores else 0.0


def _cell(rows: list[dict[str, Any]], best: float) -> str:
    scores = _scores(rows)
    if not scores:
        return "-"
    shown = spread(scores)
    return f"**{shown}**" if statistics.mean(scores) >= best - 1e-9 else shown


def _seconds(rows: list[dict[str, Any]]) -> str:
    seconds = [r["seconds"] for r in rows if r.get("seconds") is not None]
    return f"{statistics.mean(seconds):.1f}" if seconds else ""


def spread(values: list[float]) -> str:
    """Mean and, of two or more, the standard deviation."""
    return f"{statistics.mean(values):.2f}" + (f" ({statistics.stdev(values):.2f})" if len(values) > 1 else "")


def main() -> None:
    """Run the study, or write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="default: all")
    parser.add_argument("--nets", type=Path, default=Path("runs/nets"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--most", type=int, default=5, help="groups of each size and split; default 5")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    if args.table:
        table(args.out, args.table)
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        run(args.nets, args.out, args.families, args.sizes, args.most)


if __name__ == "__main__":
    main()
