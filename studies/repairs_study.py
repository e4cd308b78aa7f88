"""Every repair on the same averages: chosen on validation pairs, quoted on the others.

Fuses with gamf. Networks of validation pairs (seeds from 100 on, which no test or table uses) are scored on 3,000
*training* images that no repair sees, all others on the test images; repairs get 512 other unlabelled training images,
`weights` and `synthetic` none. Appends one JSON line for each fusion and skips what is there.

    python studies/repairs_study.py --out docs/results/repairs.jsonl
    python studies/repairs_study.py --out docs/results/repairs.jsonl --table docs/results/repairs.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from records import provenance

import weldnet
from weldnet import checkpoints, data, evaluation, models
from weldnet.fusion import (
    Auto,
    Averaged,
    BatchNormReset,
    Calibrate,
    Chain,
    NoRepair,
    Refit,
    Repair,
    Rescale,
    Synthetic,
    WeightNorms,
)

_VGG = {"width": 0.25, "bias": False}
SETS = {
    "mnist-mlp-val": ("mnist", "mlp", {}),
    "mnist-cnn-val": ("mnist", "simple_cnn", {"image_size": 28}),
    "cifar10-vgg11q-val": ("cifar10", "vgg11", _VGG),
    "cifar10-vgg11bnq-val": ("cifar10", "vgg11", {"width": 0.25, "batch_norm": True}),
    "cifar10-resnet20-val": ("cifar10", "resnet20", {}),
    "mnist-mlp": ("mnist", "mlp", {}),
    "cifar10-vgg11q": ("cifar10", "vgg11", _VGG),
    "cifar10-vgg11bnq": ("cifar10", "vgg11", {"width": 0.25, "batch_norm": True}),
    "cifar10-resnet20": ("cifar10", "resnet20", {}),
}
REPAIRS: dict[str, Repair] = {
    "none": NoRepair(),
    "weights": WeightNorms(),
    "synthetic": Synthetic(),
    "reset": BatchNormReset(),
    "rescale": Rescale(),
    "rescale, shift": Rescale(shift=True),
    "refit": Refit(),
    "refit+calibrate": Chain((Refit(), Calibrate())),
    "auto": Auto(),
}
#: Settings of refit, tried on validation pairs only.
TRIED: dict[str, Repair] = {
    "synthetic, steps=0": Synthetic(steps=0),
    "refit, rounds=1": Refit(rounds=1),
    "refit, ridge=0.03": Refit(ridge=0.03),
    "refit, ridge=0.3": Refit(ridge=0.3),
    "refit, ridge=0.3, rounds=10": Refit(ridge=0.3, rounds=10),
    "refit, rows=8192": Refit(rows=8192),
}
CHOICE = [
    "`none` is the aligned average. `reset` re-estimates BatchNorm statistics, where there are any. The command line's",
    "`data` is `reset` with BatchNorm and `rescale` without. `auto` is the default and saw the same 512 images: a",
    "quarter of them held back for its choice.",
]


def groups(name: str, files: list[Path]) -> list[tuple[Path, ...]]:
    """Return disjoint pairs, at most two; and the first four VGG11s together."""
    pairs = [tuple(files[i : i + 2]) for i in range(0, len(files) - 1, 2)][:2]
    return [*pairs, tuple(files[:4])] if name == "cifar10-vgg11q" and len(files) >= 4 else pairs


def run(nets: Path, out: Path, only: list[str], wanted: list[str]) -> None:
    """Repair everything that is not in the records yet."""
    records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(r["set"], r["networks"], r["repair"]) for r in records}
    origin = provenance()
    for name, (source, kind, options) in SETS.items():
        files = sorted((nets / name).glob("seed*.safetensors"), key=lambda f: int(f.stem[4:]))
        validation = name.endswith("-val")
        repairs = {**REPAIRS, **(TRIED if validation else {})}
        for group in groups(name, files) if not only or name in only else []:
            names = ",".join(f.stem for f in group)
            todo = [label for label in wanted or repairs if label in repairs and (name, names, label) not in done]
            if not todo:
                continue
            train = data.load(source, split="train", limit=3512)
            unlabelled = train.images[:512]
            rest = torch.utils.data.TensorDataset(train.images[512:], train.labels[512:])
            judged_on = rest if validation else data.load(source, split="test")
            averaged = fused(group, kind, options, unlabelled[:1])
            for label in todo:
                has_norm = any(isinstance(m, torch.nn.BatchNorm2d) for m in averaged.model.modules())
                if label == "reset" and not has_norm:
                    continue
                start = time.process_time()
                repaired = repairs[label](averaged, unlabelled)
                seconds = time.process_time() - start
                found = evaluation.evaluate(repaired.model, judged_on)
                record = {
                    "set": name, "networks": names, "repair": label, "accuracy": found.accuracy, "loss": found.loss,
                    "parents": [evaluation.evaluate(m, judged_on).accuracy for m in averaged.parents.values()],
                    "ensemble": evaluation.ensemble_metrics(list(averaged.parents.values()), judged_on).accuracy,
                    "summary": repaired.summary, "setting": repr(repairs[label]), "cpu_seconds": round(seconds, 2),
                    **origin,
                }  # fmt: skip
                with out.open("a") as file:
                    file.write(json.dumps(record) + "\n")


def fused(group: tuple[Path, ...], kind: str, options: dict, example: torch.Tensor) -> Averaged:
    """Align with gamf and average."""
    modules = {}
    for file in group:
        modules[file.stem] = models.build(kind, **options).eval()
        checkpoints.load_into(modules[file.stem], checkpoints.load(file), file.stem)
    structure = weldnet.capture(next(iter(modules.values())), example)
    alignment = weldnet.align(modules, structure, method="gamf")
    states = [weldnet.transport(m.state_dict(), structure, alignment[n]) for n, m in modules.items()]
    model = models.build(kind, **options).eval()
    checkpoints.load_into(model, weldnet.average(states), "fused")
    shares = dict.fromkeys(modules, 1 / len(modules))
    return Averaged(model, modules, shares, structure, alignment, example_input=example)


def table(out: Path, target: Path) -> None:
    """Write the records as Markdown: validation pairs first, then the quoted ones."""
    columns: dict[tuple[str, int], dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for line in out.read_text().splitlines():
        record = json.loads(line)
        columns[record["set"], len(record["parents"])][record["repair"]].append(record)
    lines = [
        "# Repairs",
        "",
        "Measured by us: `python studies/repairs_study.py` (its docstring says how). Accuracy in % and loss, mean over",
        "the pairs (or groups of N) that are there. Records with settings, commit and versions: `repairs.jsonl`.",
        "",
        *CHOICE,
    ]
    for title, wanted in (("Chosen on", True), ("Quoted, not tuned on", False)):
        keys = [key for key in columns if key[0].endswith("-val") == wanted]
        if not keys:
            continue
        lines += ["", f"## {title}", ""]
        heads = [f"{s}, N={n} ({len(columns[s, n]['none'])})" for s, n in keys]
        lines += ["| repair | " + " | ".join(heads) + " |", "|---|" + "---|" * len(keys)]
        for label in ("parents", "ensemble"):
            cells = [_reference(columns[key]["none"], label) for key in keys]
            lines.append(f"| *{label}* | " + " | ".join(cells) + " |")
        labels = [*REPAIRS, *(TRIED if wanted else ())]
        for label in labels:
            lines.append(
                f"| {label} | "
                + " | ".join(_cell(columns[key].get(label, []), len(columns[key]["none"])) for key in keys)
                + " |"
            )
    target.write_text("\n".join(lines) + "\n")


def _reference(records: list[dict], key: str) -> str:
    values = [v for r in records for v in (r[key] if isinstance(r[key], list) else [r[key]])]
    return f"{100 * statistics.mean(values):.2f}" if values else ""


def _cell(records: list[dict], count: int) -> str:
    """Accuracy and loss; a cell with fewer groups than its column says so."""
    if not records:
        return ""
    fewer = "" if len(records) == count else f" (only {','.join(r['networks'] for r in records)})"
    accuracy = 100 * statistics.mean(r["accuracy"] for r in records)
    return f"{accuracy:.2f}, {statistics.mean(r['loss'] for r in records):.3f}{fewer}"


def main() -> None:
    """Run the study, or write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=Path, default=Path("runs/nets"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--sets", nargs="*", default=[], help="only these sets")
    parser.add_argument("--repairs", nargs="*", default=[], help="only these repairs")
    args = parser.parse_args()
    if args.table:
        table(args.out, args.table)
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        run(args.nets, args.out, args.sets, args.repairs)


if __name__ == "__main__":
    main()
