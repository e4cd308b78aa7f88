"""Where weight matching's sweeps start: from the identity, from one pass, and what PyPI's ``rebasin`` does.

- Untrained pairs (`benchmarks/peers.py`'s networks and ResNet20; five seeds): the cosine of all weights and biases, and
  the cosine as rebasin's visits count tensors: ``paths.py`` extends a list by itself, so that the first module of every
  permutation, the one that writes its units, counts twice.
- Trained pairs: validation networks and those of the tables (``studies/train_networks.py``), accuracy and barrier of
  the midpoint: validation networks on 2,000 training images, the others on the test split. Networks with BatchNorm get
  their statistics from 512 training images, as they must after rebasin too, which does not move running statistics.

``rebasin, once`` is rebasin with every tensor counted once. Appends one JSON line a fusion and skips what is there;
`make bench-peers` installs rebasin.

    python studies/weight_matching_start.py --out docs/results/weight-matching.jsonl
    python studies/weight_matching_start.py --out docs/results/weight-matching.jsonl --table weight-matching.md
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from records import provenance
from torch import Tensor, nn

import weldnet
from weldnet import checkpoints, data, evaluation, models
from weldnet.alignment import WeightMatching

NETWORKS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "mlp": ("mlp", {}, (1, 784)),
    "vgg11 x 1/4": ("vgg11", {"width": 0.25}, (1, 3, 32, 32)),
    "resnet20": ("resnet20", {}, (1, 3, 32, 32)),
}
_VGG = {"width": 0.25, "bias": False}
SETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mnist-mlp-val": ("mnist", "mlp", {}),
    "mnist-mlp-skew2-val": ("mnist", "mlp", {}),
    "mnist-mlp-dirichlet2-val": ("mnist", "mlp", {}),
    "mnist-cnn-val": ("mnist", "simple_cnn", {"image_size": 28}),
    "cifar10-vgg11q-val": ("cifar10", "vgg11", _VGG),
    "cifar10-vgg11q-dirichlet2-val": ("cifar10", "vgg11", _VGG),
    "mnist-mlp": ("mnist", "mlp", {}),
    "cifar10-vgg11q": ("cifar10", "vgg11", _VGG),
    "cifar10-vgg11bnh": ("cifar10", "vgg11", {"width": 0.5, "batch_norm": True}),
    "cifar10-resnet20": ("cifar10", "resnet20", {}),
}
SEEDS = range(5)
OURS = {"identity": WeightMatching(begin="identity"), "pass": WeightMatching()}
WAYS = (*OURS, "rebasin", "rebasin, once")
Nets = Mapping[str, nn.Module]


def states(way: str, nets: Nets, x: Tensor, seed: int) -> tuple[list[dict[str, Tensor]], float]:
    """Return the networks in one order, and the CPU seconds of structure and permutations."""
    start = time.process_time()
    if way in OURS:
        structure = weldnet.capture(next(iter(nets.values())), x)
        alignment = weldnet.align(nets, structure, method=OURS[way], seed=seed)
        seconds = time.process_time() - start
        return [weldnet.transport(net.state_dict(), structure, alignment[n]) for n, net in nets.items()], seconds
    from rebasin import PermutationCoordinateDescent

    first, second = nets.values()
    torch.manual_seed(seed)
    with torch.no_grad(), _counted(once=way == "rebasin, once"):
        descent = PermutationCoordinateDescent(first, copy.deepcopy(second), x)
        descent.calculate_permutations()
        seconds = time.process_time() - start
        descent.apply_permutations()
    return [dict(first.state_dict()), dict(descent.model_b.state_dict())], seconds


class _counted:  # noqa: N801
    """Let rebasin count every tensor once, while this lasts."""

    def __init__(self, *, once: bool) -> None:
        from rebasin import paths

        self._kinds = (paths.LinearPath, paths.ParallelPaths, paths.PathSequence) if once else ()
        self._was = [kind.permutation_to_info for kind in self._kinds]

    def __enter__(self) -> None:
        for kind in self._kinds:
            kind.permutation_to_info = property(_members)

    def __exit__(self, *_: object) -> None:
        for kind, was in zip(self._kinds, self._was, strict=True):
            kind.permutation_to_info = was


def _members(path: Any) -> list[tuple[Any, list[Any]]]:
    found: dict[int, tuple[Any, list[Any]]] = {}
    for part in path:
        for permutation, info in part.permutation_to_info:
            known = found.setdefault(id(permutation), (permutation, []))[1]
            known += [each for each in info if each not in known]
    return list(found.values())


def cosine(one: Mapping[str, Tensor], two: Mapping[str, Tensor], counts: Mapping[str, float] | None = None) -> float:
    """Return the cosine of all weights and biases, each tensor counted as often as said."""
    keys = [key for key in one if key.endswith(("weight", "bias"))]
    inner, a, b = 0.0, 0.0, 0.0
    for key in keys:
        count, x, y = 1.0 if counts is None else counts[key], one[key].double(), two[key].double()
        inner, a, b = inner + count * _dot(x, y), a + count * _dot(x, x), b + count * _dot(y, y)
    return inner / (a * b) ** 0.5


def _dot(one: Tensor, two: Tensor) -> float:
    return float((one * two).sum())


def as_rebasin_counts(net: nn.Module, x: Tensor) -> dict[str, float]:
    """Say how often rebasin's visits count a tensor in all: twice where it writes a space, once where it reads one."""
    structure = weldnet.capture(net, x)
    counts = dict.fromkeys(net.state_dict(), 0.0)
    for place in structure.places:
        counts[place.tensor] += 1.0 if place.role == "reads" else 2.0
    return counts


def untrained() -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Yield what is measured on untrained pairs."""
    for name, (kind, options, shape) in NETWORKS.items():
        for seed, way in itertools.product(SEEDS, WAYS):

            def measure(kind: str = kind, options: Any = options, shape: Any = shape, seed: int = seed, way: str = way):
                torch.manual_seed(seed)
                nets = {n: models.build(kind, **options).eval() for n in "ab"}
                x = torch.randn(shape)
                (one, two), seconds = states(way, nets, x, seed)
                counts = as_rebasin_counts(nets["a"], x)
                return {"cosine": cosine(one, two), "counted": cosine(one, two, counts), "seconds": seconds}

            yield {"stage": "untrained", "set": name, "case": str(seed), "way": way}, measure


def trained(nets: Path) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Yield what is measured on trained pairs."""
    for name, (source, kind, options) in SETS.items():
        files = sorted((nets / name).glob("seed*.safetensors"))[: 10 if name == "mnist-mlp" else 4]
        disjoint = name == "mnist-mlp"
        pairs = zip(files[::2], files[1::2], strict=False) if disjoint else itertools.combinations(files, 2)
        groups = [(group, seed) for group in pairs for seed in (SEEDS if len(files) == 2 else SEEDS[:1])]
        for group, seed in groups:
            for way in WAYS:

                def measure(
                    source: str = source, kind: str = kind, options: Any = options, group: Any = group,
                    seed: int = seed, way: str = way, validation: bool = name.endswith("-val"),
                ):  # fmt: skip
                    nets = {file.stem: models.build(kind, **options) for file in group}
                    for file in group:
                        checkpoints.load_into(nets[file.stem], checkpoints.load(file), file.stem)
                        nets[file.stem].eval()
                    return midpoint(source, nets, way, seed, validation=validation)

                case = f"{','.join(file.stem for file in group)} seed {seed}"
                yield {"stage": "pair", "set": name, "case": case, "way": way}, measure


def midpoint(source: str, nets: Nets, way: str, seed: int, *, validation: bool) -> dict[str, Any]:
    """Score the average."""
    train = data.load(source, split="train", limit=2512)
    scored = torch.utils.data.TensorDataset(train.images[512:], train.labels[512:])
    if not validation:
        test = data.load(source, split="test")
        scored = torch.utils.data.TensorDataset(test.images, test.labels)
    found, seconds = states(way, nets, train.images[:1], seed)
    model = copy.deepcopy(next(iter(nets.values())))
    checkpoints.load_into(model, weldnet.average(found), "fused")
    reset(model, train.images[:512])
    fused = evaluation.evaluate(model, scored)
    parents = [evaluation.evaluate(net, scored).loss for net in nets.values()]
    barrier = fused.loss - statistics.mean(parents)
    return {
        "accuracy": fused.accuracy,
        "barrier": barrier,
        "cosine": cosine(*found),
        "seconds": seconds,
    }


def reset(model: nn.Module, images: Tensor) -> None:
    """Give BatchNorm layers the statistics of some images."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    if norms:
        model.train()
        with torch.no_grad():
            model(images)
    model.eval()


HEAD = """# Where weight matching starts

Measured by us: `python studies/weight_matching_start.py` (its docstring says how), commits {commits}, {machine},
PyTorch {torch}, rebasin {rebasin}; means (standard deviations) over pairs, and
where a set has only one over five seeds of the method. Records: `weight-matching.jsonl`.

`identity` is Git Re-Basin's algorithm 1 to the letter (`--option begin=identity`); `pass` is the default: the sweeps
start from one pass in which every space is matched by the tensors whose other units are matched already, unless the
identity has the higher objective. `rebasin` is the package on PyPI; `rebasin, once` is the same with every tensor
counted once.
"""
FOUND = """
## What was found

- **Why rebasin's cosine is above that of weight matching from the identity.** Not by other spaces, orders or more
  sweeps: it counts the tensors that write a space's units twice. `paths.py` puts the list of a permutation's first
  module into a dictionary and then extends that list by itself. Counted once, its cosines on VGG11 are those of
  `identity` to the last digit, and on the others within the spread. The factor makes a visit trust what lies before the
  space more than what lies behind it, which is noise at the start; so it comes to better optima of the plain cosine.
- **What weldnet does with that.** A pass that leaves out what is not matched yet goes further in the same direction,
  and saves sweeps. It was chosen on the validation pairs, beside factors of 2, 4, 8 and 1,000 on the tensors that
  write, falling factors, and the best of five random orders, which costs five times as much and gains
  a fifth to a half of it.
- **On trained networks** it is worth 6 to 11 points on VGG11, under 1 on VGG11-BN and 16 on ResNet20. Small MNIST
  networks are level. On the pair of VGG11 with unequal labels accuracy is lower within the spread, both near chance.
- **BatchNorm.** rebasin matches parameters only, as Git Re-Basin does; weldnet's `raw` objective had the running
  statistics in it, whose variances outweigh everything. Without them, on 2,000 training images of the same pairs,
  VGG11-BN went from 55.0 to 75.5 from the identity, and from 61.8 to 76.6 with the pass; ResNet20 from 19.7 to 25.1,
  and from 18.1 to 39.6. All numbers above are without.
- **The small CNN.** There rebasin renumbers the flattened positions apart from the channels, which changes what the
  network computes (outputs by 42%), so that its cosine and its accuracy are not those of a renumbering.
- **Networks that have stayed in one order** (clients of one global model, fine-tuned copies): the identity has the
  higher objective and is kept.
- **More than two networks** start from the identity. In the pass a space would be compared with networks that are not
  matched yet either; in a trial with four and eight trained networks accuracy changed by -0.4 to +0.1 points.
"""


def page(rows: list[dict[str, Any]]) -> str:
    """Write the records as Markdown."""
    commits = ", ".join(f"`{commit}`" for commit in dict.fromkeys(row["commit"] for row in rows))
    lines = [HEAD.format(**rows[-1], commits=commits)]
    lines += ["## Untrained pairs: cosine of all weights and biases; as rebasin counts them; CPU seconds", ""]
    lines += _table(rows, "untrained", NETWORKS, [("cosine", 1, 4), ("counted", 1, 4), ("seconds", 1, 2)])
    lines += ["", "## Trained pairs: accuracy of the midpoint in %", ""]
    lines += _table(rows, "pair", SETS, [("accuracy", 100, 2)])
    lines += ["", "## Trained pairs: barrier at the midpoint", "", *_table(rows, "pair", SETS, [("barrier", 1, 3)])]
    lines += ["", "## Trained pairs: cosine", "", *_table(rows, "pair", SETS, [("cosine", 1, 4)])]
    lines += ["", "## Trained pairs: CPU seconds, structure and permutations", ""]
    lines += _table(rows, "pair", SETS, [("seconds", 1, 2)])
    return "\n".join(lines) + "\n" + FOUND


def _table(rows: list[dict[str, Any]], stage: str, names: Any, columns: list[tuple[str, float, int]]) -> list[str]:
    lines = [f"| networks | runs | {' | '.join(WAYS)} |", "|---" * (2 + len(WAYS)) + "|"]
    for name in names:
        own = [row for row in rows if row["stage"] == stage and row["set"] == name]
        if not own:
            continue
        cells = []
        for way in WAYS:
            parts = []
            for key, factor, digits in columns:
                values = [factor * row[key] for row in own if row["way"] == way and key in row]
                spread = f" ({statistics.stdev(values):.{digits}f})" if len(values) > 1 and key != "seconds" else ""
                parts.append(f"{statistics.mean(values):.{digits}f}{spread}" if values else "-")
            cells.append("; ".join(parts))
        count = len({row["case"] for row in own})
        lines.append(f"| {name} | {count} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measure what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/weight-matching.jsonl"))
    parser.add_argument("--nets", type=Path, default=Path("runs/nets"))
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if args.table:
        args.table.write_text(page(rows), encoding="utf-8")
        return
    torch.set_num_threads(1)
    keys = ("stage", "set", "case", "way")
    done = {tuple(row[key] for key in keys) for row in rows}
    for what, measure in itertools.chain(untrained(), trained(args.nets)):
        if tuple(what[key] for key in keys) in done:
            continue
        record = {**what, **measure(), **provenance("rebasin")}
        print(json.dumps(record), flush=True)
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
