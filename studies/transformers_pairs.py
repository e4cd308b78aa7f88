"""Pairs of transformers from independent initialisations: the plain average, weight matching and gamf.

Two kinds of network (``transformers_networks.py``): a ViT-Ti on CIFAR-10 and a small GPT-2 on the bytes of Python's
standard library. Trains what is missing, aligns each pair, and measures on the test set the average of the two, the
line between them, and what was moved. Appends one JSON line for each pair and method, and skips what is there.
Everything is a permutation of units: nothing is trained, scaled or repaired after averaging.

    python studies/transformers_pairs.py --out docs/results/transformer-pairs.jsonl
    python studies/transformers_pairs.py --out docs/results/transformer-pairs-settings.jsonl --settings
    python studies/transformers_pairs.py --out docs/results/transformer-pairs.jsonl --table PAGE.md

``--settings`` compares settings of gamf on validation data, with networks that no other number comes from.
``--table`` puts the records into the page, between the marks that name the file of records.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from records import provenance
from torch import nn
from transformers_networks import TASKS, Part, Task, network

import weldnet
from weldnet.structure import Space, Structure

PAIRS = ((0, 1), (2, 3))
VALIDATION_PAIRS = ((100, 101),)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "naive": ("identity", {}),
    "weight_matching": ("weight_matching", {}),
    "gamf": ("gamf", {}),
    "gamf weighting=raw": ("gamf", {"weighting": "raw"}),  # the best of SETTINGS on the GPT-2s kept for choosing
}
SETTINGS = METHODS | {
    f"gamf {', '.join(f'{k}={v}' for k, v in options.items())}": ("gamf", options)
    for options in (
        {"weighting": "entry"},
        {"weighting": "tensor"},
        {"tau": 0.3},
        {"tau": 3.0},
        {"gamma": 0.9, "sweeps": 10},
        {"sigma": 4.0},
        {"sigma": 1.0},
        {"affinity": "vector"},
    )
}
POINTS, LINE_LIMIT = 11, {"cifar10-vit-tiny": 1000, "python-gpt2": 128}

_log = logging.getLogger("transformers_pairs")


def run(task: Task, pairs: Iterable[tuple[int, int]], arguments: argparse.Namespace) -> None:
    """Measure every pair and method of a task that is not in the records yet."""
    part: Part = "validation" if arguments.settings else "test"
    methods = SETTINGS if arguments.settings else METHODS
    done = {(r["set"], r["networks"], r["method"]) for r in read(arguments.out)}
    for pair in pairs:
        names = ",".join(f"seed{seed}" for seed in pair)
        wanted = {label: m for label, m in methods.items() if (task.name, names, label) not in done}
        if not wanted:
            continue
        a, b = (network(task, seed, arguments.nets) for seed in pair)
        structure, shared = prepared(task, a, b, part)
        for label, (method, options) in wanted.items():
            record = {"set": task.name, "networks": names, "part": part, "method": label, **shared}
            record |= measured(task, structure, a, b, part, method, options, line=not arguments.settings)
            with arguments.out.open("a") as file:
                file.write(json.dumps(record | circumstances()) + "\n")
            _log.info("%s %s %s: loss %.4f", task.name, names, label, record["loss"])


def prepared(task: Task, a: nn.Module, b: nn.Module, part: Part) -> tuple[Structure, dict[str, Any]]:
    """Capture the structure, prove it on both parents, and score these; what all methods share."""
    structure = weldnet.capture(a, task.example())
    errors = [weldnet.check(parent, task.example(), structure).error for parent in (a, b)]
    scores = [task.score(parent, part) for parent in (a, b)]
    return structure, {
        "structure": {
            "free_share": structure.free_share,
            "log10_renumberings": structure.log10_renumberings,
            "units": counts(structure),
            "unknown": dict(structure.unknown),
            "check": max(errors),
        },
        "parent_losses": [s.loss for s in scores],
        "parent_accuracies": [s.accuracy for s in scores],
        "uniform_loss": math.log(task.classes),
        "guess_loss": task.guess(part),
        "samples": scores[0].samples,
    }


def measured(
    task: Task,
    structure: Structure,
    a: nn.Module,
    b: nn.Module,
    part: Part,
    method: str,
    options: Mapping[str, Any],
    line: bool,
) -> dict[str, Any]:
    """Align b to a, then measure their average and, if wanted, the line between them."""
    start = time.process_time()
    alignment = weldnet.align([a, b], structure, method=method, **options)
    seconds = time.process_time() - start
    moved = copy.deepcopy(b)
    moved.load_state_dict(weldnet.transport(b.state_dict(), structure, alignment["b"]))
    middle = copy.deepcopy(a)
    middle.load_state_dict(weldnet.average([a.state_dict(), moved.state_dict()]))
    found = task.score(middle, part)
    record: dict[str, Any] = {
        "loss": found.loss,
        "accuracy": found.accuracy,
        "objective": alignment.stats.get("objective"),
        "converged": alignment.stats.get("converged"),
        "moved": moved_by_kind(structure, alignment["b"]),
        "heads": {
            space.name: alignment["b"][space.name].source.tolist()
            for space in structure.spaces
            if kind(structure, space) == "heads"
        },
        "align_cpu_seconds": round(seconds, 2),
    }
    if line:
        limit = LINE_LIMIT[task.name]
        curve = weldnet.barrier(a, moved, evaluate=partial(_loss, task, part, limit), points=POINTS)
        record |= {"barrier": curve.height, "line": curve.values, "line_limit": limit}
    return record


def _loss(task: Task, part: Part, limit: int, model: nn.Module) -> float:
    return task.score(model, part, limit).loss


# -- what was moved ----------------------------------------------------------------------------------


def kind(structure: Structure, space: Space) -> str:
    """Name the role of a space in the two networks of this study.

    Both project queries, keys and values by one layer: the units of queries and keys lie in its weight and bias only,
    those of values also in the layer that leads out. The residual stream is the root with the most places.
    """
    if structure.children(space.name):
        return "heads"
    if space.parent is not None:
        return "q/k in heads" if len({p.tensor for p in structure.places_of(space.name)}) == 2 else "v/o in heads"
    if len({p.tensor for p in structure.places_of(space.name)}) > 4:
        return "residual stream"
    return "mlp"


def counts(structure: Structure) -> dict[str, list[int]]:
    """For each kind of space, how many spaces and units there are."""
    found: dict[str, list[int]] = {}
    for space in structure.spaces:
        entry = found.setdefault(kind(structure, space), [0, 0])
        entry[0] += 1
        entry[1] += space.size
    return found


def moved_by_kind(structure: Structure, couplings: Mapping[str, Any]) -> dict[str, float]:
    """For each kind of space, the share of units that change their number."""
    moved = dict.fromkeys(counts(structure), 0.0)
    for space in structure.spaces:
        moved[kind(structure, space)] += couplings[space.name].moved * space.size
    return {name: value / counts(structure)[name][1] for name, value in moved.items()}


# -- records and the table ---------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    """Read the records, if there are any."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def circumstances() -> dict[str, Any]:
    """Say what a number was measured with."""
    return {**provenance("timm", "transformers"), "threads": torch.get_num_threads()}


def table(records: list[dict[str, Any]], line: bool) -> list[str]:
    """Write one row for each pair and method as Markdown."""
    head = "| networks | seeds | method | loss at the middle | share of the way to guessing | accuracy |"
    head += " barrier |" if line else ""
    lines = [head + " moved, % | objective | CPU s |", "|---" * (10 if line else 9) + "|"]
    shown: set[tuple[str, str]] = set()
    for r in records:
        key = (r["set"], r["networks"])
        seeds = r["networks"].replace("seed", "")
        best = sum(r["parent_losses"]) / 2
        if key not in shown:
            shown.add(key)
            losses, hits = "/".join(f"{x:.3f}" for x in r["parent_losses"]), r["parent_accuracies"]
            row = f"| {r['set']} | {seeds} | parents | {losses} | 0 | {'/'.join(f'{100 * x:.1f}' for x in hits)} |"
            lines.append(row + (" 0 |" if line else "") + " | | |")
        way = (r["loss"] - best) / (r["guess_loss"] - best)
        moved = ", ".join(f"{name} {100 * share:.0f}" for name, share in r["moved"].items())
        objective = "" if r["objective"] is None else f"{r['objective']:.3f}"
        row = f"| {r['set']} | {seeds} | {r['method']} | {r['loss']:.3f} | {way:.2f} | {100 * r['accuracy']:.1f} |"
        row += f" {r['barrier']:.3f} |" if line else ""
        lines.append(row + f" {moved} | {objective} | {r['align_cpu_seconds']:.1f} |")
    return lines


def fill(page: Path, out: Path) -> None:
    """Replace what stands between the two marks of a file of records by its table."""
    records = read(out)
    mark = f"<!-- {out.name} -->"
    before, _, after = page.read_text().split(mark)
    lines = table(records, line=all("line" in r for r in records))
    page.write_text(mark.join([before, "\n" + "\n".join(lines) + "\n", after]))


def main() -> None:
    """Run the study, or print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=Path, default=Path("runs/nets"), help="folder of the trained networks")
    parser.add_argument("--out", type=Path, required=True, help="records, JSON lines")
    parser.add_argument("--table", type=Path, help="page to put the records into; nothing is measured")
    parser.add_argument("--settings", action="store_true", help="compare gamf's settings, on validation data")
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--pairs", type=int, help="at most so many pairs of each task")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(arguments.threads)
    if arguments.table:
        fill(arguments.table, arguments.out)
        return
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    pairs = VALIDATION_PAIRS if arguments.settings else PAIRS
    for name in arguments.tasks:
        run(TASKS[name], pairs[: arguments.pairs], arguments)


if __name__ == "__main__":
    main()
