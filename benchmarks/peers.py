"""weldnet beside other ways to the same thing, in one run: read the ratios.

- `weight_matching` and PyPI's ``rebasin`` (``make bench-peers`` installs it) on the same untrained pairs: structure and
  permutations, without applying them. Both take steps on the inner product of weights, but rebasin counts tensors that
  write a space's units twice: ``studies/weight_matching_start.py`` compares the matches of many pairs by both counts.
- `gamf` and graduated assignment as the paper writes it, with the whole affinity matrix of all pairs of edges
  (n^2 x n^2 for n units), on small perceptrons of growing width: the same temperatures, sweeps and projections.
- linear assignment: SciPy, which weldnet uses, and ``lapx``.

One thread; CPU seconds, median of five (of fewer where one takes over 5 s); each case in a process of its own. The
cosine is that of all weights and biases of the first network with those of the second in its order.
Cases that are in the records already are not measured again.

    python benchmarks/peers.py                                           # writes docs/results/peers.jsonl and .md
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from floors import peak_mb
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import weldnet
from weldnet import models
from weldnet.alignment import Gamf, WeightMatching
from weldnet.assignment import best_permutation, sinkhorn, standardise

sys.path.append(str(Path(__file__).resolve().parents[1] / "studies"))

from records import provenance

ROUNDS = 5
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: models.build("mlp"), (1, 784)),
    "vgg11 x 1/4": (lambda: models.build("vgg11", width=0.25), (1, 3, 32, 32)),
    "vgg11 x 1/2": (lambda: models.build("vgg11", width=0.5), (1, 3, 32, 32)),
}
HIDDEN = (8, 16, 32)
SIZES = (512, 1024, 2048)
SETTINGS = Gamf(gamma=0.8, sweeps=2, settled=0.0, weighting="raw")


def weight_matching(name: str) -> dict[str, Any]:
    """Capture and match with weldnet."""
    return _weight_matching(name, WeightMatching())


def from_identity(name: str) -> dict[str, Any]:
    """Capture and match with weldnet as Git Re-Basin's paper does."""
    return _weight_matching(name, WeightMatching(begin="identity"))


def _weight_matching(name: str, method: WeightMatching) -> dict[str, Any]:
    first, second, x = _pair(name)
    seconds, found = _timed(lambda: _matched(first, second, x, method))
    structure, alignment = found
    moved = weldnet.transport(second.state_dict(), structure, alignment["b"])
    return {**seconds, "cosine": _cosine(first.state_dict(), moved), "sweeps": alignment.stats["sweeps"]}


def _matched(
    first: nn.Module, second: nn.Module, x: Tensor, method: WeightMatching
) -> tuple[weldnet.Structure, weldnet.Alignment]:
    structure = weldnet.capture(first, x)
    return structure, weldnet.align([first, second], structure, method=method)


def rebasin(name: str) -> dict[str, Any]:
    """Trace and match with rebasin."""
    from rebasin import PermutationCoordinateDescent

    first, second, x = _pair(name)

    def run() -> Any:
        descent = PermutationCoordinateDescent(first, copy.deepcopy(second), x)
        descent.calculate_permutations()
        return descent

    with torch.no_grad():
        seconds, descent = _timed(run)
        descent.apply_permutations()
    return {**seconds, "cosine": _cosine(first.state_dict(), descent.model_b.state_dict())}


def gamf(hidden: str) -> dict[str, Any]:
    """Anneal with weldnet."""
    first, second, x = _chain(int(hidden))
    structure = weldnet.capture(first, x)
    seconds, alignment = _timed(lambda: weldnet.align([first, second], structure, method=SETTINGS))
    moved = weldnet.transport(second.state_dict(), structure, alignment["b"])
    return {**seconds, "cosine": _cosine(first.state_dict(), moved)}


def dense_gamf(hidden: str) -> dict[str, Any]:
    """Anneal with the whole affinity matrix: K[(i, a), (j, b)] = w[i, j] w'[a, b] over all pairs of nodes."""
    first, second, _ = _chain(int(hidden))
    seconds, plans = _timed(lambda: _dense(_adjacency(first), _adjacency(second), _layers(first)))
    sources = [plan.argmax(0) for plan in plans]
    weights = [tensor.detach() for tensor in second.parameters()]
    for i, source in enumerate(sources):
        weights[i], weights[i + 1] = weights[i][source], weights[i + 1][:, source]
    moved = dict(zip(second.state_dict(), weights, strict=True))
    return {**seconds, "cosine": _cosine(first.state_dict(), moved)}


def _dense(one: Tensor, two: Tensor, layers: list[slice]) -> list[Tensor]:
    n = len(one)
    affinity = torch.einsum("ij,ab->iajb", one, two).reshape(n * n, n * n)
    affinity = affinity + affinity.T
    plan = torch.eye(n)
    for layer in layers:
        plan[layer, layer] = 1 / (layer.stop - layer.start)
    temperature = SETTINGS.tau
    while temperature >= SETTINGS.tau_min:
        for _ in range(SETTINGS.sweeps):
            for layer in layers:
                scores = (affinity @ plan.flatten()).view(n, n)[layer, layer]
                plan[layer, layer], _ = sinkhorn(standardise(scores), temperature)
        temperature *= SETTINGS.gamma
    for layer in layers:
        plan[layer, layer] = _hard(plan[layer, layer])
    for _ in range(SETTINGS.hard_sweeps):
        before = plan.clone()
        for layer in layers:
            plan[layer, layer] = _hard((affinity @ plan.flatten()).view(n, n)[layer, layer])
        if torch.equal(before, plan):
            break
    return [plan[layer, layer].T for layer in layers]


def _hard(scores: Tensor) -> Tensor:
    source = best_permutation(scores)
    return torch.nn.functional.one_hot(source, len(source)).T.to(scores.dtype)


def _adjacency(net: nn.Module) -> Tensor:
    """Edges between all nodes: inputs, hidden units, outputs."""
    weights = [tensor.detach() for tensor in net.parameters()]
    sizes = [weights[0].shape[1], *(len(w) for w in weights)]
    starts = np.cumsum([0, *sizes])
    edges = torch.zeros(int(starts[-1]), int(starts[-1]))
    for i, w in enumerate(weights):
        edges[starts[i] : starts[i + 1], starts[i + 1] : starts[i + 2]] = w.T
    return edges


def _layers(net: nn.Module) -> list[slice]:
    weights = [tensor.detach() for tensor in net.parameters()]
    starts = np.cumsum([weights[0].shape[1], *(len(w) for w in weights)]).tolist()
    return [slice(first, last) for first, last in itertools.pairwise(starts[:-1])]


def assign(case: str) -> dict[str, Any]:
    """Solve one assignment with SciPy and with lapx."""
    import lap

    kind, size = case.split()
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(int(size), int(size), generator=generator, dtype=torch.float64).numpy()
    if kind == "alike":  # features of units that are the same up to noise
        rows = torch.randn(int(size), 256, generator=generator, dtype=torch.float64)
        noise = torch.randn(int(size), 256, generator=generator, dtype=torch.float64)
        scores = (rows @ (0.7 * rows + 0.3 * noise)[torch.randperm(int(size), generator=generator)].T).numpy()
    seconds, one = _timed(lambda: linear_sum_assignment(scores, maximize=True)[1])
    other, two = _timed(lambda: lap.lapjv(-scores)[1])
    rows = np.arange(int(size))
    assert abs(scores[rows, one].sum() - scores[rows, two].sum()) <= 1e-9 * abs(scores[rows, one].sum())
    return {**seconds, "lapx_seconds": other["seconds"]}


CASES: dict[str, tuple[Callable[[str], dict[str, Any]], tuple[str, ...]]] = {
    "weight_matching": (weight_matching, tuple(NETWORKS)),
    "weight_matching, begin=identity": (from_identity, tuple(NETWORKS)),
    "rebasin": (rebasin, tuple(NETWORKS)),
    "gamf": (gamf, tuple(map(str, HIDDEN))),
    "dense gamf": (dense_gamf, tuple(map(str, HIDDEN))),
    "assignment": (assign, tuple(f"{kind} {size}" for kind in ("noise", "alike") for size in SIZES)),
}


def _pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    return make().eval(), make().eval(), torch.randn(shape)


def _chain(hidden: int) -> tuple[nn.Module, nn.Module, Tensor]:
    def make() -> nn.Module:
        sizes = (8, hidden, hidden, 4)
        layers = [nn.Linear(m, n, bias=False) for m, n in itertools.pairwise(sizes)]
        return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    torch.manual_seed(0)
    return make(), make(), torch.randn(1, 8)


def _timed(work: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
    found, times = None, list[float]()
    while len(times) <= ROUNDS and (not times or times[-1] < 5):  # the first warms up where there is another
        start = time.process_time()
        found = work()
        times.append(time.process_time() - start)
    times = times[1:] or times
    return {"seconds": median(times), "rounds": len(times), "peak_mb": peak_mb()}, found


def _cosine(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    keys = [key for key in one if key.endswith(("weight", "bias"))]
    a, b = (torch.cat([state[key].detach().flatten().double() for key in keys]) for state in (one, two))
    return float(a @ b / (a.norm() * b.norm()))


HEAD = """# Beside other implementations

Measured by us: `make bench-peers` (the docstring of `benchmarks/peers.py` says how), commits {commits}, {machine},
PyTorch {torch}, rebasin {rebasin}, lapx {lapx}, SciPy {scipy}; one thread, CPU seconds, medians, on a machine with
other work beside it: read the ratios. Untrained networks. Records: `peers.jsonl`.
"""

STARTS = """The cosine is that of all weights and biases, which both look for. weldnet's sweeps start from one pass by
what is matched already. rebasin starts from the identity and counts the tensors that write a space's units twice, which
is not the cosine but helps to a better one. Git Re-Basin's algorithm to the letter (`begin=identity`) has neither;
`weight-matching.md` says more, on more pairs, trained ones too:""".splitlines()


def page(rows: list[dict[str, Any]]) -> str:
    """Write the records as Markdown."""
    found = {(row["tool"], row["case"]): row for row in rows}
    commits = ", ".join(f"`{commit}`" for commit in dict.fromkeys(row["commit"] for row in rows))
    lines = [HEAD.format(**rows[0], commits=commits), "## Weight matching: structure and permutations", ""]
    lines += ["| network | weldnet, s | rebasin, s | rebasin / weldnet | cosine, weldnet | rebasin |"]
    lines += ["|---|---|---|---|---|---|", *_compared(found, NETWORKS, "weight_matching", "rebasin")]
    lines += ["", *STARTS, ""]
    lines += ["| network | weldnet, s | rebasin, s | rebasin / weldnet | cosine, weldnet | rebasin |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += _compared(found, NETWORKS, "weight_matching, begin=identity", "rebasin")
    lines += ["", "## GAMF, two hidden layers of as many units, 8 inputs, 4 outputs: growing with the units", ""]
    lines += ["| units a layer | weldnet, s | whole affinity matrix, s | ratio | cosine, weldnet | whole matrix |"]
    lines += ["|---|---|---|---|---|---|", *_compared(found, map(str, HIDDEN), "gamf", "dense gamf")]
    lines += ["", "## Linear assignment", "", "| scores | SciPy, s | lapx, s | SciPy / lapx |", "|---|---|---|---|"]
    for case in CASES["assignment"][1]:
        row = found["assignment", case]
        ratio = row["seconds"] / row["lapx_seconds"]
        lines += [f"| {case} | {row['seconds']:.3g} | {row['lapx_seconds']:.3g} | {ratio:.2f} |"]
    return "\n".join(lines) + "\n"


def _compared(found: Mapping[tuple[str, str], Any], cases: Any, ours: str, theirs: str) -> list[str]:
    pairs = [(case, found[ours, case], found[theirs, case]) for case in cases]
    return [
        f"| {case} | {a['seconds']:.3g} | {b['seconds']:.3g} | {b['seconds'] / a['seconds']:.1f} | {a['cosine']:.3f} "
        f"| {b['cosine']:.3f} |"
        for case, a, b in pairs
    ]


def main() -> None:
    """Measure everything and write records and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/peers.jsonl"))
    parser.add_argument("--case", nargs=2, metavar=("TOOL", "CASE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.case:
        print(json.dumps(CASES[args.case[0]][0](args.case[1])))
        return
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    known = {(row["tool"], row["case"]) for row in rows}
    for tool, case in ((tool, case) for tool, (_, cases) in CASES.items() for case in cases):
        if (tool, case) in known:
            continue
        command = [sys.executable, __file__, "--case", tool, case]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        rows.append({"tool": tool, "case": case, **json.loads(done), **provenance("rebasin", "lapx", "scipy")})
        print(tool, case, done, flush=True)
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    args.out.with_suffix(".md").write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
