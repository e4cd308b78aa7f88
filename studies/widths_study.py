"""Transport plans on trained networks: pairs of one width, fusing a wide network into a narrow one, and folding.

Trained networks come from ``studies/train_networks.py`` (sets ``mnist-mlp``, ``mnist-mlp-w150``, ``mnist-cnn``, ... and
``cifar10-vgg11q``). Everything is raw: one-shot, no repair, no fine-tuning, scored on the whole test set. Methods that
look at activations see 200 unlabelled training images. Appends one JSON line for each result and skips what is there.

    python studies/widths_study.py --out docs/results/widths.jsonl
    python studies/widths_study.py --out docs/results/widths.jsonl --table docs/results/widths.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from records import provenance
from torch import nn

import weldnet
from weldnet import checkpoints, data, evaluation, models
from weldnet.alignment import AlignmentMethod, FrankWolfe, Gamf, Identity, OptimalTransport, WeightMatching

Factory = Callable[[], nn.Module]


def _mlp(width: float) -> Factory:
    sizes = (784, *(round(units * width) for units in (400, 200, 100)), 10)
    return lambda: models.build("mlp", sizes=sizes)


def _vgg(width: float) -> Factory:
    return lambda: models.build("vgg11", width=width, bias=False)


def _cnn(width: float) -> Factory:
    return lambda: models.build("simple_cnn", width=width)


#: Sets by name: where the images come from, who builds the network.
SETS: dict[str, tuple[str, Factory]] = {
    "mnist-mlp": ("mnist", _mlp(1.0)),
    "mnist-mlp-w125": ("mnist", _mlp(1.25)),
    "mnist-mlp-w150": ("mnist", _mlp(1.5)),
    "mnist-mlp-w175": ("mnist", _mlp(1.75)),
    "mnist-mlp-w200": ("mnist", _mlp(2.0)),
    "mnist-cnn": ("mnist", _cnn(1.0)),
    "mnist-cnn-w150": ("mnist", _cnn(1.5)),
    "cifar10-vgg11q": ("cifar10", _vgg(0.25)),
    "cifar10-vgg11q-w150": ("cifar10", _vgg(0.375)),
}
#: The same network at other widths, widest last.
WIDER = {
    "mnist-mlp": ("mnist-mlp-w125", "mnist-mlp-w150", "mnist-mlp-w175", "mnist-mlp-w200"),
    "mnist-cnn": ("mnist-cnn-w150",),
    "cifar10-vgg11q": ("cifar10-vgg11q-w150",),
}

PLANS: dict[str, AlignmentMethod] = {
    "weights": OptimalTransport(),
    "weights, entropic 0.001": OptimalTransport(plan="entropic", epsilon=0.001),
    "weights, entropic 0.01": OptimalTransport(plan="entropic", epsilon=0.01),
    "weights, entropic 0.03": OptimalTransport(plan="entropic", epsilon=0.03),
    "activations": OptimalTransport(on="activations"),
    "activations, cosine": OptimalTransport(on="activations", cost="cosine"),
    "activations, entropic 0.001": OptimalTransport(on="activations", plan="entropic", epsilon=0.001),
    "activations, entropic 0.01": OptimalTransport(on="activations", plan="entropic", epsilon=0.01),
}
OTHERS: dict[str, AlignmentMethod] = {
    "naive": Identity(),
    "weight_matching": WeightMatching(),
    "gamf": Gamf(),
    "frank_wolfe": FrankWolfe(),
}


class Bench:
    """Trained networks, their test images, and the records so far."""

    def __init__(self, nets: Path, out: Path) -> None:
        self.nets, self.out = nets, out
        self.records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        self.done = {(r["part"], r["set"], r["networks"], r["label"]) for r in self.records}
        self.origin = provenance("POT")
        self._images: dict[str, tuple[Any, Any]] = {}

    def network(self, name: str, seed: int) -> nn.Module | None:
        """Return a trained network, or None if it is not there."""
        file = self.nets / name / f"seed{seed}.safetensors"
        if not file.exists():
            return None
        model = SETS[name][1]()
        checkpoints.load_into(model, checkpoints.load(file), file.stem)
        return model.eval()

    def images(self, name: str) -> tuple[Any, Any]:
        """Return the test set and unlabelled training images."""
        source = SETS[name][0]
        if source not in self._images:
            self._images[source] = (
                data.load(source, split="test"),
                data.load(source, split="train", limit=200).images,
            )
        return self._images[source]

    def record(
        self, part: str, name: str, networks: str, label: str, make: Callable[[], nn.Module], **more: Any
    ) -> None:
        """Make a network unless it is in the records, score it, and write that down."""
        if (part, name, networks, label) in self.done:
            return
        start = time.process_time()
        model = make()
        seconds = round(time.process_time() - start, 3)
        found = evaluation.evaluate(model, self.images(name)[0])
        line = {
            "part": part,
            "set": name,
            "networks": networks,
            "label": label,
            "accuracy": found.accuracy,
            "loss": found.loss,
            "cpu_seconds": seconds,
            **more,
            **self.origin,
        }
        with self.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


def run(bench: Bench) -> None:
    """Measure everything that is not in the records yet."""
    for name, wider in WIDER.items():
        for wide in wider:
            for seed in (0, 1, 2):
                _into(bench, name, wide, seed)
    for name in ("mnist-mlp", "cifar10-vgg11q"):
        for pair in ((0, 1), (2, 3), (4, 5)):
            _pair(bench, name, pair)


def _pair(bench: Bench, name: str, seeds: tuple[int, int]) -> None:
    networks = {f"seed{s}": bench.network(name, s) for s in seeds}
    if None in networks.values():
        return
    test, unlabelled = bench.images(name)
    names = ",".join(networks)
    for key, network in networks.items():
        bench.record("pairs", name, names, f"parent {key}", lambda network=network: network)
    for label, method in (OTHERS | PLANS).items():
        bench.record("pairs", name, names, label, lambda method=method: _fused(networks, test, unlabelled, method))


def _fused(networks: Any, test: Any, unlabelled: Any, method: AlignmentMethod, **more: Any) -> nn.Module:
    given = unlabelled if method.needs_data else None
    x = test.images[:1]
    return weldnet.fuse(networks, x, method=method, data=given, repair="none", progress=False, **more).model


def _into(bench: Bench, name: str, wide_name: str, seed: int) -> None:
    """A wide network and a narrow one of another seed: cut off, carried, folded alone; and both fused."""
    wide, narrow = bench.network(wide_name, seed), bench.network(name, seed + 1)
    if wide is None or narrow is None:
        return
    test, unlabelled = bench.images(name)
    x, names = test.images[:1], f"{wide_name}/seed{seed},{name}/seed{seed + 1}"
    networks = {"wide": wide, "narrow": narrow}

    def record(part: str, label: str, make: Callable[[], nn.Module]) -> None:
        bench.record(part, name, names, label, make, wide=wide_name)

    record("widths", "parent wide", lambda: wide)
    record("widths", "parent narrow", lambda: narrow)
    record("widths", "fold", lambda: weldnet.fold(wide, narrow, x))
    for share, part in ((1.0, "alone"), (0.5, "both")):
        more: dict[str, Any] = {"into": "narrow", "weights": [share, 1 - share]}
        record("widths", f"{part}: truncation", lambda more=more: _truncated(networks, more["weights"]))
        for label in ("weights", "weights, entropic 0.01", "activations", "activations, entropic 0.01"):
            method = PLANS[label]
            record(
                "widths",
                f"{part}: {label}",
                lambda method=method, more=more: _fused(networks, test, unlabelled, method, **more),
            )


def _truncated(networks: dict[str, nn.Module], weights: list[float]) -> nn.Module:
    """Average the narrow network with the first units of the wide one."""
    narrow = networks["narrow"].state_dict()
    cut = {k: t[tuple(slice(n) for n in narrow[k].shape)] for k, t in networks["wide"].state_dict().items()}
    return _loaded(networks["narrow"], weldnet.average([cut, narrow], weights))


def _loaded(like: nn.Module, state: Any) -> nn.Module:
    import copy

    model = copy.deepcopy(like)
    checkpoints.load_into(model, state, "average")
    return model


# -- the page ----------------------------------------------------------------------------------------


def table(out: Path, target: Path) -> None:
    """Write means over groups as Markdown."""
    records = [json.loads(line) for line in out.read_text().splitlines()]
    lines = [
        "# Transport plans: pairs, other widths, folding",
        "",
        "Measured by us: `python studies/widths_study.py` (its docstring says how; the networks are those of",
        "`studies/train_networks.py`). Test accuracy in %, mean (standard deviation) over pairs; raw: one-shot,",
        "nothing is repaired or fine-tuned. Methods on activations see 200 unlabelled training images. Records:",
        "`widths.jsonl`.",
        '`weight_matching` here is that of before its first pass (`begin="identity"`).',
        "",
        "## Pairs of one width",
        "",
        *_pairs_table([r for r in records if r["part"] == "pairs"]),
        "",
        "## A wide network and a narrow one, into the narrow one's widths",
        "",
        "`truncation` takes the first units of the wide network. `alone`: the wide network by itself, carried (or",
        "folded) to the narrow widths; `both`: the average of that and the narrow network, which is another seed.",
        "",
        *_widths_table([r for r in records if r["part"] == "widths"]),
    ]
    target.write_text("\n".join(lines) + "\n")


def _pairs_table(records: list[dict[str, Any]]) -> Iterator[str]:
    sets = list(dict.fromkeys(r["set"] for r in records))
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for r in records:
        cells[r["set"], "parents" if r["label"].startswith("parent") else r["label"]].append(100 * r["accuracy"])
    yield "| method | " + " | ".join(sets) + " |"
    yield "|---|" + "---|" * len(sets)
    for label in ("parents", *OTHERS, *PLANS):
        named = f"optimal_transport: {label}" if label in PLANS else label
        yield f"| {named} | " + " | ".join(spread(cells[s, label]) for s in sets) + " |"


def _widths_table(records: list[dict[str, Any]]) -> Iterator[str]:
    sets = list(dict.fromkeys(r["wide"] for r in records))
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for r in records:
        cells[r["wide"], r["label"]].append(100 * r["accuracy"])
    yield "| | " + " | ".join(sorted(sets)) + " |"
    yield "|---|" + "---|" * len(sets)
    for label in dict.fromkeys(r["label"] for r in records):
        yield f"| {label} | " + " | ".join(spread(cells[s, label]) for s in sorted(sets)) + " |"


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
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.table:
        table(args.out, args.table)
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        run(Bench(args.nets, args.out))


if __name__ == "__main__":
    main()
