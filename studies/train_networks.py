"""Train the networks that the studies fuse.

    python studies/train_networks.py                          # every set, in order
    python studies/train_networks.py mnist-mlp:0-3 --list     # some seeds of one set
    python studies/train_networks.py mnist-mlp --adopt RUN/networks  # copy what is trained to the cache of a run

Each network is `<out>/<set>/seed<k>.safetensors` with a JSON record beside it; those that exist are skipped,
and an interrupted training is resumed. A seed decides the initial weights and the order of the data. Sets
whose name ends in `-val` are for choosing settings, so that the others stay untouched by that choice.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from weldnet import data
from weldnet.checkpoints import atomic_path, load, load_into, save
from weldnet.data import Scheme
from weldnet.evaluation import evaluate
from weldnet.experiments import NetworkSpec, Trained, keep, obtain
from weldnet.training import Recipe

_log = logging.getLogger("train_networks")


@dataclass(frozen=True, kw_only=True)
class NetworkSet:
    """Networks that differ only in their seed, and where the data is split in their part of it.

    Of ``parts`` networks, seed k sees part ``k % parts`` of split number ``k // parts``.
    """

    model: str
    dataset: str
    recipe: Recipe
    seeds: tuple[int, ...]
    note: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    scheme: Scheme | None = None
    parts: int = 1


_MNIST = Recipe(epochs=10, schedule="onecycle")
_CIFAR = Recipe(epochs=10, schedule="onecycle", augment="crop-flip", precision="bfloat16")
_VALIDATION = tuple(range(100, 106))

_MLP = NetworkSet(model="mlp", dataset="mnist", recipe=_MNIST, seeds=tuple(range(10)))
_CNN = NetworkSet(model="simple_cnn", dataset="mnist", recipe=replace(_MNIST, epochs=3), seeds=_VALIDATION[:4])
_VGG = NetworkSet(
    model="vgg11",
    options={"width": 0.25, "batch_norm": False, "bias": False},
    dataset="cifar10",
    recipe=replace(_CIFAR, lr=2e-3),
    seeds=tuple(range(10)),
)
_VGG_BN = NetworkSet(
    model="vgg11",
    options={"width": 0.25, "batch_norm": True},
    dataset="cifar10",
    recipe=replace(_CIFAR, lr=3e-3, epochs=6),
    seeds=tuple(range(6)),
    note="6 epochs, not 10: enough with batch norm, and time was short",
)
_RESNET = NetworkSet(
    model="resnet20",
    dataset="cifar10",
    recipe=replace(_CIFAR, lr=5e-3, epochs=4),
    seeds=tuple(range(4)),
    note="4 epochs, not 10: an epoch takes 100 seconds on one core",
)

_VGG_BN_HALF = replace(
    _VGG_BN, options={"width": 0.5, "batch_norm": True}, seeds=(0, 1), note="6 epochs: 80 s each on one core"
)


def _width_sets() -> dict[str, NetworkSet]:
    """Sets of other widths, for folding and for fusing into the networks of width 1."""
    sizes = {w: (784, *(round(units * w) for units in (400, 200, 100)), 10) for w in (1.25, 1.5, 1.75, 2.0)}
    short = replace(_MLP, recipe=replace(_MNIST, epochs=3), seeds=(0, 1, 2), note="3 epochs, not 10: enough for MNIST")
    mlps = {f"mnist-mlp-w{w * 100:.0f}": replace(short, options={"sizes": s}) for w, s in sizes.items()}
    cnns = {
        name: replace(_CNN, options={"width": w}, seeds=(0, 1, 2))
        for name, w in (("mnist-cnn", 1.0), ("mnist-cnn-w150", 1.5))
    }
    vgg = replace(_VGG, options={**_VGG.options, "width": 0.375}, seeds=(0, 1, 2))
    return mlps | cnns | {"cifar10-vgg11q-w150": vgg}


def _split_sets() -> dict[str, NetworkSet]:
    """Sets whose networks saw different parts of the training data: 2, 4 or 8 parts, by Dirichlet(0.5) or 8/2 skew."""
    bases = {
        "mnist-mlp": (_MLP, (2, 4, 8), 5),
        "cifar10-vgg11q": (replace(_VGG, recipe=replace(_VGG.recipe, epochs=20)), (2, 4, 8), 2),
        "cifar10-vgg11bnh": (_VGG_BN_HALF, (2,), 1),
        "cifar10-resnet20": (replace(_RESNET, recipe=replace(_RESNET.recipe, epochs=6)), (2,), 1),
    }
    return {
        f"{name}-{scheme}{parts}": replace(
            base, scheme=scheme, parts=parts, seeds=tuple(range(parts * splits)), note=""
        )
        for name, (base, sizes, splits) in bases.items()
        for parts in sizes
        for scheme in ("dirichlet", "skew")
    }


SETS: dict[str, NetworkSet] = {
    "mnist-mlp": _MLP,
    "mnist-mlp-val": replace(_MLP, seeds=_VALIDATION),
    "mnist-cnn-val": _CNN,
    "cifar10-vgg11q-val": replace(_VGG, seeds=_VALIDATION[:4]),
    "cifar10-vgg11q": _VGG,
    "cifar10-resnet20-val": replace(_RESNET, seeds=_VALIDATION[:2]),
    "cifar10-vgg11bnq": _VGG_BN,
    "cifar10-vgg11bnq-val": replace(_VGG_BN, seeds=_VALIDATION[:2]),
    "cifar10-resnet20": _RESNET,
    "cifar10-vgg11bnh": _VGG_BN_HALF,
    **_split_sets(),
    **_width_sets(),
    "cifar10-vgg11q-dirichlet2-val": replace(_VGG, scheme="dirichlet", parts=2, seeds=(100, 101)),
    "cifar10-vgg11q-skew2-val": replace(_VGG, scheme="skew", parts=2, seeds=(100, 101)),
    "mnist-mlp-dirichlet2-val": replace(_MLP, scheme="dirichlet", parts=2, seeds=(100, 101)),
    "mnist-mlp-skew2-val": replace(_MLP, scheme="skew", parts=2, seeds=(100, 101)),
}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    jobs = [job for text in arguments.sets or SETS for job in parse_jobs(text)]
    for name, seed in jobs:
        if arguments.adopt is not None:
            adopt_network(name, seed, arguments.out, arguments.adopt)
        elif arguments.list:
            print(arguments.out / name / f"seed{seed}.safetensors")
        else:
            train_network(name, seed, arguments.out)


def parse_jobs(text: str) -> list[tuple[str, int]]:
    """Read `set`, `set:3` or `set:0-3` as pairs of a set and a seed."""
    name, _, wanted = text.partition(":")
    if name not in SETS:
        raise SystemExit(f"unknown set {name!r}; known sets: {', '.join(SETS)}")
    if not wanted:
        return [(name, seed) for seed in SETS[name].seeds]
    first, _, last = wanted.partition("-")
    return [(name, seed) for seed in range(int(first), int(last or first) + 1)]


def spec_of(name: str, seed: int) -> NetworkSpec:
    """Return what makes a network of a set."""
    choice = SETS[name]
    return NetworkSpec(
        model=choice.model,
        options=choice.options,
        dataset=choice.dataset,
        data=_identity(choice.dataset),
        recipe=choice.recipe,
        seed=seed,
        scheme=choice.scheme,
        parts=choice.parts if choice.scheme is not None else 1,
        threads=torch.get_num_threads(),
    )


def train_network(name: str, seed: int, out: Path) -> None:
    """Train one network of a set unless its file exists; the state and a copy by hash are kept in ``<out>/cache``."""
    path = out / name / f"seed{seed}.safetensors"
    if path.exists():
        _log.info("%s exists", path)
        return
    spec = spec_of(name, seed)
    trained = obtain(spec, out / "cache", say=_log.info)
    record = {
        "set": name,
        "seed": seed,
        "note": SETS[name].note,
        "model": spec.model,
        "options": dict(spec.options),
        "dataset": spec.dataset,
        "scheme": spec.scheme,
        "parts": spec.parts,
        "rows": trained.rows,
        "accuracy": trained.scores["accuracy"],
        "loss": trained.scores["loss"],
        "training_accuracy": trained.history[-1]["accuracy"] if trained.history else None,
        "recipe": asdict(replace(spec.recipe, seed=seed)),
        "seconds": round(trained.seconds, 1),
        "epoch_seconds": round(trained.seconds / max(1, spec.recipe.epochs), 2),
        "history": list(trained.history),
        **trained.where,
    }
    save(trained.model.state_dict(), path)
    with atomic_path(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
    _log.info("%s: accuracy %.4f, loss %.4f, %.0f s", path, record["accuracy"], record["loss"], trained.seconds)


def adopt_network(name: str, seed: int, out: Path, cache: Path) -> bool:
    """Put a network that was trained earlier into the cache of a run, scored again; say whether it is there."""
    path, spec = out / name / f"seed{seed}.safetensors", spec_of(name, seed)
    if not path.exists() or (cache / f"{spec.key}.json").exists():
        return path.exists()
    record = json.loads(path.with_suffix(".json").read_text())
    ours = {"model": spec.model, "options": spec.options, "dataset": spec.dataset, "scheme": spec.scheme}
    ours |= {"parts": spec.parts, "recipe": asdict(replace(spec.recipe, seed=seed)), "threads": spec.threads}
    for key, value in ours.items():
        if json.loads(json.dumps(value)) != record[key]:
            raise SystemExit(f"{path}: {key} is {record[key]!r} in its record and {value!r} in the set")
    model = spec.build()
    load_into(model, load(path), path.name)
    scores = evaluate(model, data.load(spec.dataset, split="test")).scores
    where = {key: record[key] for key in ("commit", "torch", "machine", "threads")}
    history = tuple(record.get("history", ()))
    keep(spec, cache, Trained(model.eval(), scores, history, record["seconds"], record["rows"], where))
    _log.info("%s: kept as %s, accuracy %.4f", path, spec.key, scores["accuracy"])
    return True


@lru_cache(maxsize=8)
def _identity(dataset: str) -> str:
    return data.identify(dataset, split="train").sha256


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET[:SEEDS]", help=f"default: all of {', '.join(SETS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/nets"), help="folder of the networks")
    parser.add_argument("--threads", type=int, help="threads of one process; default: PyTorch's choice")
    parser.add_argument("--adopt", type=Path, metavar="CACHE", help="copy what is trained to the cache of a run")
    parser.add_argument("--list", action="store_true", help="print the files that would be made, and stop")
    return parser


if __name__ == "__main__":
    main()
