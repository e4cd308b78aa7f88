"""Every step of a fusion beside its floor: capture, affinity, assignment, transport, average, and gamf as a whole.

    python benchmarks/profile_steps.py --label after            # every case; appends to docs/results/speed.jsonl
    python benchmarks/profile_steps.py --label after --only vgg11 resnet18
    PYTHONPATH=old/src python benchmarks/profile_steps.py --label before     # another version of the sources
    python benchmarks/profile_steps.py --page docs/results/speed.md          # writes the page from the records

One process a case and part, one thread; CPU seconds, medians of five, of 75 where a step takes milliseconds. A floor is
what the step's matrix products and bytes take at the rates that the same process measures (``floors.py``).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from floors import ROUNDS, Rates, Work, assignments, beside, cpu_seconds, middle, peak_mb, size_of, sweep
from torch import Tensor, nn

import weldnet
from weldnet import models, records
from weldnet.affinity import InnerProduct
from weldnet.alignment import Alignment, Gamf, Problem
from weldnet.alignment._ascent import start
from weldnet.alignment._rough import Precision
from weldnet.assignment import Permutation, best_permutation
from weldnet.fusion import average

sys.path.append(str(Path(__file__).resolve().parents[1] / "studies"))

from zoo import declare_torchvision

OUT = Path("docs/results/speed.jsonl")
IMAGE = (1, 3, 32, 32)


def _timm(name: str) -> nn.Module:
    declare_torchvision()  # which both libraries import, and which has no build for torch's CPU wheels
    import timm

    return timm.create_model(name, num_classes=10)


def _llama() -> nn.Module:
    declare_torchvision()
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        use_cache=False,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


#: Name: how a network is made, and its example input.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "mlp": (lambda: models.build("mlp"), lambda: torch.zeros(1, 784)),
    "vgg11 x 1/4": (lambda: models.build("vgg11", width=0.25, bias=False), lambda: torch.zeros(IMAGE)),
    "vgg11 x 1/2": (lambda: models.build("vgg11", width=0.5, bias=False), lambda: torch.zeros(IMAGE)),
    "vgg11": (lambda: models.build("vgg11", bias=False), lambda: torch.zeros(IMAGE)),
    "resnet18": (lambda: models.build("resnet18"), lambda: torch.zeros(IMAGE)),
    "resnet50": (lambda: models.build("resnet50"), lambda: torch.zeros(IMAGE)),
    "vit-b/16": (lambda: _timm("vit_base_patch16_224"), lambda: torch.zeros(1, 3, 224, 224)),
    "llama-1.1b (meta)": (_llama, lambda: {"input_ids": torch.zeros(1, 8, dtype=torch.long)}),
}
ALIGNED = ("mlp", "vgg11 x 1/4", "vgg11 x 1/2", "vgg11", "resnet18", "resnet50")
SHORT = 15  # times five rounds, where one takes milliseconds


def steps(name: str) -> list[dict[str, Any]]:
    """Measure the steps of one case one by one."""
    make, example = CASES[name]
    torch.manual_seed(0)
    pair = [make() for _ in range(1 if name.endswith("(meta)") else 2)]
    x = example()
    rates = Rates.measure()
    rounds = 1 if len(pair) == 1 else ROUNDS
    seconds, structure = cpu_seconds(lambda: weldnet.capture(pair[0], x), rounds, warm=rounds > 1)
    found = [_row("capture", seconds, None if len(pair) == 1 else _forward(pair[0], x), parameters=_count(pair[0]))]
    if len(pair) == 1:
        return found
    states = [dict(net.state_dict()) for net in pair]
    moved = _permuted(structure)
    copied = Work(bytes=size_of(states[1]))
    work: list[tuple[str, Callable[[], Any], Work]] = [
        ("copy into new memory", lambda: {key: tensor.clone() for key, tensor in states[1].items()}, copied),
        ("transport", lambda: weldnet.transport(states[1], structure, moved["b"]), copied),
        ("average", lambda: average(states), Work(bytes=1.5 * size_of(states[1]))),
        ("assignment", lambda: _assign(structure), assignments(structure)),
    ]
    for step, run, least in work:
        short = cpu_seconds(run, 1)[0][0] < 0.1
        seconds, floors = beside(run, least, SHORT if short else 1)
        found.append(_row(step, seconds, middle(floors)))
    problem = Problem(structure, {"a": states[0], "b": states[1]})
    if not any(space.parent for space in structure.spaces):
        runs = [_affinity(problem, seed) for seed in range(rounds + 1)]
        found.append(_row("affinity", runs[1:] or runs, rates.floor(sweep(structure))))
    return found


def gamf(name: str, precision: Precision = "float32") -> list[dict[str, Any]]:
    """Measure a whole alignment, against the products of the sweeps that it made."""
    make, example = CASES[name]
    torch.manual_seed(0)
    pair = [make() for _ in range(2)]
    structure = weldnet.capture(pair[0], example())
    before = peak_mb()
    problem = Problem(structure, {"a": pair[0].state_dict(), "b": pair[1].state_dict()})
    with torch.no_grad():
        seconds, found = cpu_seconds(lambda: Gamf(precision=precision)(problem), ROUNDS, warm=False)
    least = sweep(structure) * found.stats["soft_sweeps"] + sweep(structure, soft=False) * found.stats["sweeps"]
    stats = {k: found.stats[k] for k in ("objective", "soft_sweeps", "sweeps")}
    step = "gamf" if precision == "float32" else f"gamf, {precision}"
    row = _row(step, seconds, None, parameters=_count(pair[0]), models_mb=before, **stats)
    rates = Rates.measure()  # last: its arrays are not to count in the peak
    return [{**row, "floor": rates.floor(least), "gflops_per_s": rates.flops / 1e9, "gb_per_s": rates.bytes / 1e9}]


def fuse(name: str) -> list[dict[str, Any]]:
    """Measure :func:`weldnet.fuse` end to end and say how much of it each step is."""
    make, example = CASES[name]
    torch.manual_seed(0)
    pair = [make() for _ in range(2)]
    before = peak_mb()
    seconds, result = cpu_seconds(lambda: weldnet.fuse(pair, example(), progress=False), ROUNDS, warm=False)
    return [{**_row("fuse", seconds, None), "models_mb": before, "shares": result.report.seconds}]


def count(number: int, name: str = "vgg11 x 1/4") -> list[dict[str, Any]]:
    """Measure gamf on N networks."""
    make, example = CASES[name]
    torch.manual_seed(0)
    networks = [make() for _ in range(number)]
    structure = weldnet.capture(networks[0], example())
    before = peak_mb()
    problem = Problem(structure, {str(i): n.state_dict() for i, n in enumerate(networks)})
    with torch.no_grad():
        seconds, found = cpu_seconds(lambda: Gamf()(problem), ROUNDS)
    stats = {k: found.stats[k] for k in ("objective", "soft_sweeps", "sweeps")}
    return [{**_row(f"gamf, N = {number}", seconds, None, **stats), "models_mb": before}]


PARTS: dict[str, tuple[Callable[[str], list[dict[str, Any]]], tuple[str, ...]]] = {
    "steps": (steps, tuple(CASES)),
    "gamf": (gamf, ALIGNED),
    "bfloat16": ((lambda name: gamf(name, "bfloat16")), ALIGNED),
    "fuse": (fuse, ("vgg11 x 1/4", "vgg11", "resnet18")),
    **{f"n{n}": ((lambda name, n=n: count(n, name)), ("vgg11 x 1/4",)) for n in (2, 4, 8, 16)},
}


def _row(step: str, seconds: list[float], floor: float | None, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "seconds": middle(seconds),
        "rounds": len(seconds),
        "floor": floor,
        "peak_mb": peak_mb(),
        **more,
    }


def _affinity(problem: Problem, seed: int) -> float:
    """Seconds of all affinities of a pair, once, from couplings that were never seen before."""
    generator = torch.Generator().manual_seed(seed)
    ascent = start(problem, "root")
    ascent.soften()
    for space in problem.structure.spaces:
        noise = torch.rand(1, space.size, space.size, generator=generator)
        ascent.couplings[space.name] = noise / noise.sum(1, keepdim=True)
    with torch.no_grad():
        begin = time.process_time()
        for space in problem.structure.roots:
            ascent.pool(space, InnerProduct()).scores(1)
        return time.process_time() - begin


def _assign(structure: weldnet.Structure) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [best_permutation(torch.randn(s.size, s.size, generator=generator)) for s in structure.roots]


def _forward(model: nn.Module, x: Any) -> float:
    net = copy.deepcopy(model).eval()
    with torch.no_grad():
        return middle(cpu_seconds(lambda: net(**x) if isinstance(x, dict) else net(x))[0])


def _permuted(structure: weldnet.Structure) -> Alignment:
    """Permutations of every space; blocks of nested spaces move as wholes."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Permutation] = {}
    for space in structure.spaces:
        if space.parent is None:
            found[space.name] = Permutation(torch.randperm(space.size, generator=generator))
        else:
            blocks = found[space.parent].source
            found[space.name] = Permutation((blocks[:, None] * space.block + torch.arange(space.block)).flatten())
    return Alignment({"a": {n: Permutation.identity(len(p)) for n, p in found.items()}, "b": found})


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _alone(part: str, name: str) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--part", part, "--only", name]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", default="after")
    parser.add_argument("--only", nargs="*", default=list(CASES))
    parser.add_argument("--parts", nargs="*", default=list(PARTS))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.page:
        from speed_page import write

        write(given.page, records.read(given.out))
    elif given.part:
        print(json.dumps(PARTS[given.part][0](given.only[0])))
    else:
        for part in given.parts:
            for name in (n for n in PARTS[part][1] if n in given.only):
                rows = _alone(part, name)
                _append(given.out, given.label, name, rows)
                for row in rows:
                    print(name, {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def _append(out: Path, label: str, name: str, rows: list[Mapping[str, Any]]) -> None:
    """Add records to the file; a later one of the same label, case and step replaces an earlier one when it is read."""
    with out.open("a", encoding="utf-8") as file:
        for row in rows:
            numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
            record = records.Record(
                kind="result",
                key=f"{label}/{name}/{row['step']}",
                cell={"stage": label, "architecture": name, "step": row["step"]},
                values=numbers,
                extra={k: v for k, v in row.items() if k not in numbers and k != "step"},
                where=records.where(),
            )
            file.write(record.to_json() + "\n")


if __name__ == "__main__":
    main()
