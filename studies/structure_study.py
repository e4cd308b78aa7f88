"""What weldnet captures of every architecture of the reference list (``zoo.py``), proven and timed.

Each entry runs in a process of its own with a time limit; a crash or a time-out is a row. Capture is timed on the
network as its package makes it (float32, one thread, after one pass that pays for torch's own start). The check uses
live activations (``live.py``) in float64: two random renumberings of everything on two inputs. Power: leave one moved
tensor as it was; the output must change, else the check proves nothing for that tensor.

    make study-structure
    python studies/structure_study.py --out docs/results/structure.jsonl --page docs/supported-architectures.md
    python studies/structure_study.py ... --only resnet18 gpt2      # runs these and replaces their records
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from live import call, enliven
from records import one_line, provenance, run_alone
from torch import Tensor
from zoo import ZOO, Entry, declare_torchvision

import weldnet
from weldnet.structure import Referee, Structure, random_renumbering, renumber

LIMIT = 600.0  # seconds for one entry
META = "llama 7B"
SEED = 0
POWER = 1e-6
SAMPLED = 48  # of the moved tensors, at most this many are put back
#: Allowed change of the output in float64, and where the model itself casts to float32.
DOUBLE, SINGLE = 1e-9, 1e-5
#: log10 of the number of renumberings in closed form, worked out by hand.
EXPECTED = {
    "resnet18": 5934.5,
    "resnet50": 25638.3,
    "vgg11": 32023.8,
    "vgg16_bn": 35168.5,
    "alexnet": 28325.9,
    "densenet121": 16536.5,
    "mobilenet_v2": 21116.4,
    "resnext50_32x4d": 24223.1,
    "convnext_tiny": 77559.8,
    "vit_b_16": 140226.4,
    "vit_tiny_patch16_224": 29392.5,
    "mixer_s16_224": 52375.8,
}


# -- one entry, in its own process ------------------------------------------------------------------


@dataclass
class Proof:
    """A captured architecture and what random renumberings of it did.

    Args:
        parameters: how many the network has.
        seconds: how long capture took.
        change: largest relative change of the output.
        tolerance: what is allowed.
        referee: the network with live activations, and its answers.
        state: its weights, all spaces renumbered.
    """

    parameters: int
    structure: Structure
    seconds: float
    change: float
    tolerance: float
    referee: Referee
    state: dict[str, Tensor]


def prove(entry: Entry, seed: int = SEED) -> Proof:
    """Capture one architecture and renumber it at random, twice.

    Args:
        entry: an entry of the zoo.
        seed: of weights, inputs and renumberings.
    """
    torch.manual_seed(seed)
    model, example = entry.build().eval(), entry.example()
    with torch.no_grad():
        call(copy.deepcopy(model), example)  # a copy: some models keep tensors from their first pass
    start = time.process_time()  # one thread: what capture takes on a machine that does nothing else
    structure = weldnet.capture(model, example)
    seconds = time.process_time() - start
    parameters = sum(p.numel() for p in model.parameters())
    generator = torch.Generator().manual_seed(seed)
    # The referee goes to float64 itself, where the model can.
    referee = Referee(enliven(model, example, seed).float(), example, generator, structure.outputs)
    moves = [random_renumbering(structure, generator) for _ in range(2)]
    states = [renumber(referee.state, structure, sources) for sources in moves]
    change = max(referee.error(state) for state in states)
    tolerance = DOUBLE if referee.tolerance <= DOUBLE else SINGLE
    return Proof(parameters, structure, seconds, change, tolerance, referee, states[0])


def measure(entry: Entry) -> dict[str, Any]:
    """Return the record of one architecture."""
    proof = prove(entry)
    return {
        "parameters": proof.parameters,
        "seconds": round(proof.seconds, 3),
        "change": proof.change,
        "tolerance": proof.tolerance,
        **described(proof.structure),
        **power(proof),
    }


def described(structure: Structure) -> dict[str, Any]:
    """Say how much is free, and why the rest is not."""
    fixed = Counter({reason: share for reason, share in structure.completeness().items() if reason != "free"})
    return {
        "spaces": len(structure.spaces),
        "nested": sum(space.parent is not None for space in structure.spaces),
        "places": len(structure.places),
        "free_share": structure.free_share,
        "log10": structure.log10_renumberings,
        "fixed": dict(fixed.most_common()),
        "unknown": dict(structure.unknown),
    }


def power(proof: Proof) -> dict[str, Any]:
    """Put back one moved tensor after the other (some, evenly spaced, of many), and see how much the output changes."""
    referee, structure, state = proof.referee, proof.structure, proof.state
    before = {name: tensor for name, tensor in referee.state.items() if name not in structure.aliases}
    moved = [name for name, tensor in before.items() if not torch.equal(tensor, state[name])]
    felt: dict[str, float] = {}
    for name in moved[:: -(-len(moved) // SAMPLED) or 1]:
        ties = [alias for alias, of in structure.aliases.items() if of == name]
        felt[name] = referee.change({**state, **dict.fromkeys([name, *ties], before[name])})
    deaf = [name for name, change in felt.items() if not change > POWER and is_deaf(proof, name)]
    weakest = min((name for name in felt if name not in deaf), key=lambda name: felt[name], default=None)
    return {
        "moved_tensors": len(moved),
        "tried_tensors": len(felt),
        "power_share": sum(change > POWER for change in felt.values()) / len(felt) if felt else None,
        "weakest": [weakest, felt[weakest]] if weakest else None,
        "deaf_share": len(deaf) / len(felt) if felt else None,
        "powerless": [name for name, change in felt.items() if not change > POWER and name not in deaf][:20],
        "deaf": deaf[:20],
    }


def is_deaf(proof: Proof, name: str) -> bool:
    """Whether a tensor cannot show: the output stays as it is when all its values are rescaled at random."""
    referee = proof.referee
    generator = torch.Generator().manual_seed(SEED)
    tensor = referee.state[name]
    other = (tensor.double() * (0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64))).to(tensor)
    ties = [alias for alias, of in proof.structure.aliases.items() if of == name]
    change = referee.change({**referee.state, **dict.fromkeys([name, *ties], other)})
    return change <= min(proof.tolerance, 10 * max(proof.change, 1e-12))


def measure_meta() -> dict[str, Any]:
    """Capture a 7B Llama on the meta device: no weights, so no check."""
    declare_torchvision()
    import transformers

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig()).eval()
        example = {"input_ids": torch.zeros(1, 8, dtype=torch.int64)}
    start = time.process_time()
    structure = weldnet.capture(model, example)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "seconds": round(seconds, 3), "peak_gb": round(peak, 2), **described(structure)}


# -- all of them, and the page ----------------------------------------------------------------------


def run(out: Path, only: list[str]) -> None:
    """Measure, replacing earlier records of the same entries."""
    kept = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    kept = [record for record in kept if record["name"] not in only]
    source = provenance("torchvision", "timm", "transformers")
    order = [*ZOO, META]
    for name in only:
        record = run_alone(measure_meta if name == META else partial(measure, ZOO[name]), LIMIT)
        kept.append({"name": name, "seed": SEED, **record, **source})
        kept.sort(key=lambda record: order.index(record["name"]))
        out.write_text("".join(json.dumps(record) + "\n" for record in kept))
        print(f"{name:28s} {summary(record)}", flush=True)


def summary(record: dict[str, Any]) -> str:
    """One line for the terminal."""
    if "error" in record:
        return f"fails: {record['error']}"
    change = f"{record['change']:.0e}" if "change" in record else "not checked"
    return f"{change}, {record['free_share']:.2%} free, 10^{record['log10']:.1f}, {record['seconds']:.2f} s"


HEAD = """# Supported architectures

Any PyTorch model can be given to weldnet; these are the ones that it is measured on. Written by `make study-structure`
(`studies/structure_study.py` says how, `studies/zoo.py` lists them): seed {seed}, commit `{commit}`, PyTorch {torch},
torchvision {torchvision}, timm {timm}, transformers {transformers}; {machine}, one thread. Records:
`results/structure.jsonl`.

{totals}

- **free**: share of the hidden axis positions that can be renumbered (inputs, outputs, kernel positions do not count).
- **log10**: of the number of renumberings that keep the function; **expected**: worked out by hand, where it was.
- **change**: largest relative change of the output over random renumberings of everything, in float64 with live
  activations. At most 1e-9 is allowed, 1e-5 where the model itself casts to float32 (marked *).
- **power**: share of the moved tensors (of many: at most 48, evenly spaced) that change the output by more than
  1e-6 when they alone are left unmoved. Of the others, some *cannot show*: the output does not depend on them, as on
  the bias of attention keys, which the softmax takes out again. For the rest, which *did not show*, the check proves
  nothing. Rows of before this was told apart have one number only. Then the weakest of those that can show.
- **seconds**: capture, all of it, in CPU seconds. **fixed**: the most frequent reasons why hidden positions cannot
  move, with shares.
"""

TITLES = {
    "torchvision": "torchvision (default sizes, 1000 classes)",
    "timm": "timm (default sizes)",
    "transformers": "transformers (from small configurations)",
    "torch.nn": "torch.nn (small networks around one layer)",
}


def write_page(out: Path, page: Path) -> None:
    """Write the records as Markdown, one table a family."""
    records = {r["name"]: r for r in map(json.loads, out.read_text().splitlines())}
    commits = ", ".join(sorted({r["commit"] for r in records.values()}))
    first = next(iter(records.values()))
    lines = [HEAD.format(**{**first, "commit": commits, "totals": totals(records)})]
    for family, title in TITLES.items():
        lines += [f"## {title}\n"]
        lines += ["| architecture | parameters | free | log10 | expected | change | power | seconds | fixed |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        names = sorted(name for name, entry in ZOO.items() if entry.family == family and name in records)
        lines += [row(name, ZOO[name].options, records[name]) for name in names]
        lines += [""]
    if META in records:
        lines += ["## Without weights: a 7B Llama on the meta device\n", meta_line(records[META])]
    page.write_text("\n".join(lines).rstrip("\n") + "\n")


def totals(records: dict[str, dict[str, Any]]) -> str:
    """The figures of all entries in a sentence or two."""
    entries = [records[name] for name in ZOO if name in records]
    good = [r for r in entries if "error" not in r]
    idle = sum(not r["moved_tensors"] for r in good)  # nothing moves: keeping the function says nothing
    kept = [r for r in good if r["change"] <= r["tolerance"] and r["moved_tensors"]]
    seconds = sorted(r["seconds"] for r in good)
    known = [name for name in EXPECTED if "log10" in records.get(name, {})]
    met = [name for name in known if f"{records[name]['log10']:.1f}" == f"{EXPECTED[name]:.1f}"]
    tensors = sum(r["moved_tensors"] for r in good)
    powerful, deaf = (sum(r["moved_tensors"] * (r.get(k) or 0) for r in good) for k in ("power_share", "deaf_share"))
    return (
        f"**{len(kept)} of {len(entries)}** keep their function under random renumberings of everything; "
        f"in {idle} nothing moves, {len(entries) - len(good)} fail, {len(ZOO) - len(entries)} were not run. "
        f"Capture takes {seconds[len(seconds) // 2]:.2f} s in the median, "
        f"{seconds[-1]:.1f} s at most. {len(met)} of {len(known)} numbers of renumberings are the expected ones. "
        f"{powerful / max(tensors, 1):.1%} of the {tensors} moved tensors have power"
        + (f", {deaf / max(tensors, 1):.1%} cannot show." if all("deaf_share" in r for r in good) else ".")
    )


def row(name: str, options: str, record: dict[str, Any]) -> str:
    """One line of a table."""
    shown = f"{name} ({options})" if options else name
    if "error" in record:
        return f"| {shown} |  |  |  |  |  |  |  | fails: {record['error']} |"
    cells = [
        shown,
        f"{record['parameters'] / 1e6:.1f} M" if record["parameters"] >= 1e5 else f"{record['parameters']:,}",
        f"{record['free_share']:.1%}",
        f"{record['log10']:.1f}",
        f"{EXPECTED[name]:.1f}" if name in EXPECTED else "",
        change(record),
        felt(record),
        f"{record['seconds']:.2f}",
        reasons(record),
    ]
    return "| " + " | ".join(cells) + " |"


def change(record: dict[str, Any]) -> str:
    """The largest change, in bold where it is more than allowed."""
    text = f"{record['change']:.0e}" + ("*" if record["tolerance"] > DOUBLE else "")
    return text if record["change"] <= record["tolerance"] else f"**{text}**"


def felt(record: dict[str, Any]) -> str:
    """Share of tensors with power, and the weakest."""
    if record["weakest"] is None:
        return "nothing moves"
    name, least = record["weakest"]
    parts = [f"{record['power_share']:.1%}"]
    cannot = record.get("deaf_share") or 0.0
    silent = 1 - record["power_share"] - cannot if "deaf_share" in record else 0.0
    parts += [f"{cannot:.1%} cannot show"] if cannot else []
    parts += [f"{silent:.1%} did not show"] if silent > 1e-9 else []
    return f"{', '.join(parts)}; {least:.0e} at `{name}`"


def reasons(record: dict[str, Any], most: int = 3) -> str:
    """The most frequent reasons for what is fixed, and operations without a rule."""
    found = list(record["fixed"].items())
    parts = [f"{one_line(reason, 90)} {share:.1%}" for reason, share in found[:most]]
    rest = sum(share for _, share in found[most:])
    parts += [f"others {rest:.1%}"] if rest else []
    parts += [f"no rule for {op} ({count}x)" for op, count in record["unknown"].items()]
    return "; ".join(parts)


def meta_line(record: dict[str, Any]) -> str:
    """What became of the model without weights."""
    if "error" in record:
        return f"Fails: {record['error']}"
    return (
        f"`LlamaConfig()` as transformers ships it, {record['parameters'] / 1e9:.2f} billion parameters: captured in "
        f"{record['seconds']:.1f} s with at most {record['peak_gb']:.2f} GB of memory, {record['spaces']} spaces, "
        f"{record['free_share']:.1%} free, 10^{record['log10']:.1f} renumberings. "
        f"Fixed: {reasons(record) or 'nothing'}."
    )


def main() -> None:
    """Run the study and write its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=[*ZOO, META], default=[*ZOO, META])
    args = parser.parse_args()
    torch.set_num_threads(1)
    declare_torchvision()
    import timm  # noqa: F401
    import transformers  # noqa: F401

    run(args.out, args.only)
    write_page(args.out, args.page)


if __name__ == "__main__":
    main()
