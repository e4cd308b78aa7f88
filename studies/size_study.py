"""Sizes between one parent and all of them: accuracy, parameters in use and stored.

Trained networks come from ``studies/train_networks.py``. Fuses two networks at every size with gamf, without a repair
(networks with BatchNorm get their statistics from 512 unlabelled training images), and scores them on the whole test
set. With ``--choice`` it compares ways to choose the units on a validation pair instead, scored on 3,000 training
images. Appends one JSON line for each and skips what is there.

    python studies/size_study.py --out docs/results/size.jsonl
    python studies/size_study.py --choice --out docs/results/size-choice.jsonl
    python studies/size_study.py --out docs/results/size.jsonl --choices docs/results/size-choice.jsonl \\
        --page docs/results/size.md
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from records import provenance
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import weldnet
from weldnet import data, evaluation, models
from weldnet.fusion import _budget

SETS: dict[str, tuple[str, Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "mnist-mlp": ("mnist", lambda: models.build("mlp"), ((0, 1), (2, 3), (0, 1, 2, 3))),
    "cifar10-vgg11q": (
        "cifar10",
        lambda: models.build("vgg11", width=0.25, bias=False),
        ((0, 1), (2, 3), (0, 1, 2, 3)),
    ),
    "cifar10-vgg11bnq": ("cifar10", lambda: models.build("vgg11", width=0.25, batch_norm=True), ((0, 1),)),
    "cifar10-resnet20": ("cifar10", lambda: models.build("resnet20"), ((0, 1),)),
}
SIZES = {2: (1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0), 4: (1.0, 1.5, 2.0, 3.0, 4.0)}
VALIDATION = ("cifar10-vgg11q-val", (100, 101))


def load(nets: Path, name: str, seeds: Iterable[int]) -> dict[str, nn.Module] | None:
    """Return trained networks by seed, or None if one is missing."""
    _, factory, _ = SETS[name.removesuffix("-val")]
    files = {f"seed{seed}": nets / name / f"seed{seed}.safetensors" for seed in seeds}
    if not all(file.exists() for file in files.values()):
        return None
    return {key: weldnet.load_model(file, factory()).eval() for key, file in files.items()}


def fused_record(networks: dict[str, nn.Module], size: float, scored: Any, unlabelled: Tensor) -> dict[str, Any]:
    """Fuse at one size and measure."""
    first = next(iter(networks.values()))
    normed = any(isinstance(module, nn.BatchNorm2d) for module in first.modules())
    repair = weldnet.BatchNormReset() if normed else "none"
    result = weldnet.fuse(networks, unlabelled[:1], size=size, data=unlabelled, repair=repair, progress=False)
    sized, whole = result.report.size, sum(p.numel() for p in first.parameters())
    found = evaluation.evaluate(result.model, scored)
    return {
        "size": size,
        "accuracy": found.accuracy,
        "loss": found.loss,
        "used": 1.0 if sized is None else sized.used,
        "stored": result.report.parameters / whole,
        "units": {} if sized is None else sized.apart,
        "kept": {} if sized is None else dict(sized.kept),
        "repair": result.report.repair,
        "seconds": result.report.seconds["average"],
    }


def run(nets: Path, out: Path) -> None:
    """Measure every set at every size."""
    done = {(r["set"], r["networks"], r["size"]) for r in read(out)}
    for name, (source, _, groups) in SETS.items():
        test, train = data.load(source, split="test"), data.load(source, split="train", limit=512)
        for seeds in groups:
            networks = load(nets, name, seeds)
            if networks is None:
                continue
            label = ",".join(networks)
            missing = [size for size in SIZES[len(seeds)] if (name, label, size) not in done]
            if not missing:
                continue
            known = {
                "set": name,
                "networks": label,
                "parents": [evaluation.evaluate(network, test).accuracy for network in networks.values()],
                "ensemble": evaluation.ensemble_metrics(list(networks.values()), test).accuracy,
            }
            for size in missing:
                append(out, {**known, **fused_record(networks, size, test, train.images), **provenance()})


# -- ways to choose --------------------------------------------------------------------------------


def _both(parts: list[Tensor]) -> Tensor:
    return sum(parts, torch.zeros_like(parts[0])) / parts[0].shape[1]


def _first(parts: list[Tensor]) -> Tensor:
    return parts[0] / parts[0].shape[1]


def _last(parts: list[Tensor]) -> Tensor:
    return parts[-1] / parts[-1].shape[1]


def _units_alike(parts: list[Tensor]) -> Tensor:
    return torch.ones_like(parts[0]) / parts[0].shape[1]


CHOICES: dict[str, Callable[[list[Tensor]], Tensor] | None] = {
    "incoming times outgoing": None,
    "incoming plus outgoing": _both,
    "incoming": _first,
    "outgoing": _last,
    "any unit of a layer": _units_alike,
}


def compare_choices(nets: Path, out: Path) -> None:
    """Measure what other worths of a unit would give on the validation pair."""
    networks = load(nets, *VALIDATION)
    if networks is None:
        raise SystemExit(f"train {VALIDATION[0]} first: python studies/train_networks.py {VALIDATION[0]}:100-101")
    images = data.load("cifar10", split="train")
    scored = TensorDataset(images.images[:3000], images.labels[:3000])
    done = {(r["choice"], r["size"]) for r in read(out)}
    own = _budget.combine
    for choice, combine in CHOICES.items():
        _budget.combine = combine or own
        for size in (1.1, 1.2, 1.4, 1.6, 1.8):
            if (choice, size) not in done:
                record = fused_record(networks, size, scored, images.images[-512:])
                append(out, {"choice": choice, "networks": ",".join(networks), **record, **provenance()})
    _budget.combine = own


# -- records and page ------------------------------------------------------------------------------


def read(out: Path) -> list[dict[str, Any]]:
    """Return the records that are there."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def append(out: Path, record: dict[str, Any]) -> None:
    """Add one record."""
    with out.open("a") as file:
        file.write(json.dumps(record) + "\n")


def page(out: Path, choices: Path | None, target: Path) -> None:
    """Write the tables as Markdown."""
    lines = [
        "# Size: from one parent to all of them",
        "",
        "Measured by us: `python studies/size_study.py` (its docstring says how). gamf, no fine-tuning, no labels.",
        "Accuracy in %. In use: numbers that are not 0 just because they lie between units kept apart, which is what",
        "the budget counts; stored: all numbers of the network, a plain one of the parents' class. Both in parents.",
        "Networks with BatchNorm get their statistics from 512 unlabelled training images.",
        "CIFAR-10 is a JPEG copy. Records: `size.jsonl`.",
        "",
        "| networks | N | groups | parents | ensemble | size | accuracy | in use | stored |",
        "|---|---|---|---|---|---|---|---|---|",
        *_rows(read(out)),
    ]
    if choices is not None:
        lines += [
            "",
            "## The choice of units",
            "",
            f"On a validation pair ({VALIDATION[0]}, seeds {VALIDATION[1]}), accuracy in % on 3,000 training images;",
            "all are divided by what the units cost. The first one is used. What matters most is that early layers,",
            "which are small, come first, and that neighbours of layers that are apart already are cheap.",
            "",
            *_choice_rows(read(choices)),
        ]
    target.write_text("\n".join(lines) + "\n")


def _rows(records: list[dict[str, Any]]) -> Iterator[str]:
    groups: dict[tuple[str, int, float], list[dict[str, Any]]] = defaultdict(list)
    for r in records:
        groups[r["set"], len(r["parents"]), r["size"]].append(r)
    for (name, count, size), found in groups.items():
        mean = {key: statistics.mean(r[key] for r in found) for key in ("accuracy", "ensemble", "used", "stored")}
        parents = statistics.mean(p for r in found for p in r["parents"])
        yield (
            f"| {name} | {count} | {len(found)} | {100 * parents:.2f} | {100 * mean['ensemble']:.2f} | {size:g} | "
            f"{100 * mean['accuracy']:.2f} | {mean['used']:.3f} | {mean['stored']:.3f} |"
        )


def _choice_rows(records: list[dict[str, Any]]) -> Iterator[str]:
    sizes = sorted({r["size"] for r in records})
    yield "| worth of a unit | " + " | ".join(f"{size:g}" for size in sizes) + " |"
    yield "|---|" + "---|" * len(sizes)
    for choice in CHOICES:
        found = {r["size"]: f"{100 * r['accuracy']:.1f}" for r in records if r["choice"] == choice}
        if found:
            yield f"| {choice} | " + " | ".join(found.get(size, "") for size in sizes) + " |"


def main() -> None:
    """Run the study, or write its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=Path, default=Path("runs/nets"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--choice", action="store_true", help="compare ways to choose the units")
    parser.add_argument("--choices", type=Path, help="records of --choice, for the page")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.page:
        page(args.out, args.choices, args.page)
    elif args.choice:
        compare_choices(args.nets, args.out)
    else:
        run(args.nets, args.out)


if __name__ == "__main__":
    main()
