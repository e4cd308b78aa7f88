"""The main job on real networks: naive, weight matching and gamf, with gamf's published defaults.

Trained networks come from ``studies/train_networks.py``. Fuses disjoint and further pairs, then 4 and 8 networks, and
scores them on the whole test set; networks with BatchNorm get their statistics from 512 unlabelled training images.
Appends one JSON line for each fusion and skips what is there.

    python studies/main_job.py --out docs/results/main-job.jsonl
    python studies/main_job.py --out docs/results/main-job.jsonl --table docs/results/main-job.md
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections import defaultdict
from pathlib import Path

import torch

import weldnet
from weldnet import checkpoints, data, evaluation, models

SETS = {
    "mnist-mlp": ("mnist", lambda: models.build("mlp"), (2, 4, 8)),
    "cifar10-vgg11q": ("cifar10", lambda: models.build("vgg11", width=0.25, bias=False), (2, 4, 8)),
    "cifar10-vgg11bnq": ("cifar10", lambda: models.build("vgg11", width=0.25, batch_norm=True), (2,)),
    "cifar10-resnet20": ("cifar10", lambda: models.build("resnet20"), (2,)),
}
METHODS = {
    "naive": ("identity", {}),
    "weight_matching": ("weight_matching", {}),
    "gamf": ("gamf", {}),
    "gamf sigma=4": ("gamf", {"sigma": 4.0}),
}


def groups(files: list[Path], size: int) -> list[tuple[Path, ...]]:
    """Return up to five groups of networks, disjoint ones first, wrapping round."""
    if len(files) < size:
        return []
    starts = list(range(0, len(files) - size + 1, size)) + list(range(1, len(files) - size + 1, 2))
    found = [tuple(files[i : i + size]) for i in starts]
    return list(dict.fromkeys(found))[:5]


def run(nets: Path, out: Path) -> None:
    """Fuse everything that is not in the records yet."""
    records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(r["set"], r["networks"], r["method"]) for r in records}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    for set_name, (source, factory, sizes) in SETS.items():
        files = sorted((nets / set_name).glob("seed*.safetensors"), key=lambda f: int(f.stem[4:]))
        test, train = data.load(source, split="test"), data.load(source, split="train", limit=512)
        for size in sizes:
            for group in groups(files, size):
                names = ",".join(f.stem for f in group)
                modules = {f.stem: factory() for f in group}
                for file in group:
                    checkpoints.load_into(modules[file.stem], checkpoints.load(file), file.stem)
                for label, (method, options) in METHODS.items():
                    if (set_name, names, label) in done or (size > 2 and label == "gamf sigma=4"):
                        continue
                    start = time.process_time()
                    fusion = weldnet.fuse(modules, test.images[:1], method=method, data=train.images, **options)
                    cpu = time.process_time() - start
                    found = evaluation.evaluate(fusion.model, test)
                    record = {
                        "set": set_name,
                        "size": size,
                        "networks": names,
                        "method": label,
                        "accuracy": found.accuracy,
                        "loss": found.loss,
                        "parents": [evaluation.evaluate(m, test).accuracy for m in modules.values()],
                        "ensemble": evaluation.ensemble_metrics(list(modules.values()), test).accuracy,
                        "repair": fusion.report.repair,
                        "check": max(row.equivalence or 0.0 for row in fusion.report.rows),
                        "objective": fusion.report.objective,
                        "align_seconds": fusion.report.seconds["align"],
                        "cpu_seconds": round(cpu, 3),
                        "setting": fusion.report.method,
                        "commit": commit,
                        "torch": torch.__version__,
                        "threads": torch.get_num_threads(),
                        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                    }
                    with out.open("a") as file:
                        file.write(json.dumps(record) + "\n")


def table(out: Path, target: Path) -> None:
    """Write means over groups as Markdown."""
    rows: dict[tuple[str, int], dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for line in out.read_text().splitlines():
        record = json.loads(line)
        rows[record["set"], record["size"]][record["method"]].append(record)
    lines = [
        "# The main job on real networks",
        "",
        "Measured by us: `python studies/main_job.py` (its docstring says how). Test accuracy in %, mean (standard",
        "deviation) over groups of networks; one-shot, no fine-tuning. `parents`: mean over all parents.",
        "Networks with BatchNorm: statistics from 512 unlabelled training images, also for the naive average.",
        "CIFAR-10 is a JPEG copy. Records with seeds, commit and versions: `main-job.jsonl`.",
        "`weight_matching` is that of before its new start (`weight-matching.md`), which is better on VGG11 and with",
        "BatchNorm.",
        "",
        "| networks | N | groups | parents | ensemble | " + " | ".join(METHODS) + " | gamf, CPU s |",
        "|---|---|---|---|---|" + "---|" * (len(METHODS) + 1),
    ]
    for (set_name, size), by_method in rows.items():
        any_method = by_method["gamf"] or next(iter(by_method.values()))
        parents = [100 * p for r in any_method for p in r["parents"]]
        ensemble = [100 * r["ensemble"] for r in any_method]
        cells = [spread([100 * r["accuracy"] for r in by_method.get(m, [])]) for m in METHODS]
        seconds = f"{statistics.mean(r['cpu_seconds'] for r in any_method):.1f}"
        lines.append(
            f"| {set_name} | {size} | {len(any_method)} | {spread(parents)} | {spread(ensemble)} | "
            + " | ".join(cells)
            + f" | {seconds} |"
        )
    target.write_text("\n".join(lines) + "\n")


def spread(values: list[float]) -> str:
    """Mean and standard deviation, or nothing."""
    if not values:
        return ""
    return f"{statistics.mean(values):.2f} ({statistics.stdev(values) if len(values) > 1 else 0.0:.2f})"


def main() -> None:
    """Run the study, or write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=Path, default=Path("runs/nets"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.table:
        table(args.out, args.table)
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        run(args.nets, args.out)


if __name__ == "__main__":
    main()
