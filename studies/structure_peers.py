"""Which renumberings do tools believe in, and are they right? weldnet, rebasin and Torch-Pruning on 15 networks.

Every network has live activations (``live.py``) and runs in float64 and eval mode. Each pair of tool and network runs
in a process of its own. The judge is the same for all: the largest relative change of the output, over the example
input and a random one, when everything that the tool found is renumbered at random; then every group on its own.

    make study-peers
    python studies/structure_peers.py --out docs/results/structure-peers.jsonl --page docs/results/structure-peers.md
    python studies/structure_peers.py ... --only resnet18 gpt2      # runs these and replaces their records
"""

from __future__ import annotations

import argparse
import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from live import call, live
from peer_tools import TOOLS, Found, Rebasin
from records import NO_ANSWER, one_line, provenance, run_alone
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import ZOO, declare_torchvision

MODELS = [
    "alexnet",
    "vgg16_bn",
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "googlenet",
    "shufflenet_v2_x1_0",
    "resnext50_32x4d",
    "densenet121",
    "convnext_tiny",
    "vit_tiny_patch16_224",
    "swin_t",
    "gpt2",
    "LSTM",
    "U-Net with pixel shuffle",
]
NAMES = ("weldnet", "rebasin", "Torch-Pruning")
LIMIT = 600.0  # CPU seconds for one tool on one network, the judge's included
RIGHT = 1e-9
SEED = 0


# -- one tool on one network, in its own process ----------------------------------------------------


def measure(tool: str, name: str) -> dict[str, Any]:
    """Let a tool find what it can in a network, and judge it."""
    model, example = live(ZOO[name], SEED)
    if hasattr(model, "config"):
        model.config.use_cache = False  # caches are not what the network answers
    with torch.no_grad():
        call(model, example)  # the first pass pays for torch's own start
    generator = torch.Generator().manual_seed(SEED)
    judge = Judge(model, example, generator)
    try:
        found = TOOLS[tool](model, example)
        return judged(found, judge, generator)
    except Exception as error:  # whatever a tool raises is its answer
        return {"error": one_line(f"{type(error).__name__}: {error}")}


def judged(found: Found, judge: Judge, generator: torch.Generator) -> dict[str, Any]:
    """Renumber what was found, together and group by group."""
    everything = range(len(found.sizes))
    state = found.renumbered(everything, generator)
    record: dict[str, Any] = {
        "change": judge.change(state),
        "moved": moved(found.model.state_dict(), state),
        "groups": len(found.sizes),
        "log10": sum(found.sizes),
        "seconds": round(found.seconds, 3),
        "notes": dict(found.notes),
    }
    right = right_alone(found, judge, generator)
    record["groups_right"] = sum(right)
    record["log10_right"] = sum(size for size, good in zip(found.sizes, right, strict=True) if good)
    if isinstance(found, Rebasin) and any(name.endswith("running_mean") for name in state):
        found.statistics = True
        record["change_with_statistics"] = judge.change(found.renumbered(everything, generator))
        record["groups_right_with_statistics"] = sum(right_alone(found, judge, generator))
    return record


def right_alone(found: Found, judge: Judge, generator: torch.Generator) -> list[bool]:
    """Whether each group keeps the function when nothing else is renumbered."""
    return [judge.change(found.renumbered([group], generator)) <= RIGHT for group in range(len(found.sizes))]


class Judge:
    """What a model answers to its example input and to a random one, to compare with."""

    def __init__(self, model: nn.Module, example: Any, generator: torch.Generator) -> None:
        draw = lambda t: torch.randn(t.shape, generator=generator, dtype=t.dtype) if t.is_floating_point() else t  # noqa: E731
        self._model, self._inputs = copy.deepcopy(model), [example, pytree.tree_map_only(Tensor, draw, example)]
        self._answers = [self._answer(x) for x in self._inputs]

    def change(self, state: dict[str, Tensor]) -> float:
        """Return the largest change of an output with this state, relative to its largest entry."""
        self._model.load_state_dict(state)
        worst = 0.0
        for x, before in zip(self._inputs, self._answers, strict=True):
            for old, new in zip(before, self._answer(x), strict=True):
                worst = max(worst, float((new - old).abs().max() / old.abs().max().clamp_min(1e-300)))
        return worst

    def _answer(self, example: Any) -> list[Tensor]:
        with torch.no_grad():
            answer = call(self._model, example)
        if isinstance(answer, dict):  # what transformers give back; a cache among it is no output
            answer = list(answer.values())
        leaves = answer if isinstance(answer, list | tuple) else [answer]
        return [t.clone() for t in leaves if isinstance(t, Tensor)]


def moved(before: dict[str, Any], after: dict[str, Any]) -> float:
    """The share of the entries of all floating-point tensors that hold another value than before."""
    pairs = [(tensor, after[name]) for name, tensor in before.items() if tensor.is_floating_point()]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


# -- all of them, and the page ----------------------------------------------------------------------


def run(out: Path, only: list[str], tools: list[str]) -> None:
    """Measure, replacing earlier records of the same networks and tools."""
    kept = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    kept = [record for record in kept if record["model"] not in only or record["tool"] not in tools]
    source = provenance("rebasin", "torch-pruning", "torchview", "torchvision", "timm", "transformers")
    for name in only:
        for tool in tools:
            record = run_alone(partial(measure, tool, name), LIMIT)
            kept.append({"model": name, "tool": tool, "seed": SEED, **record, **source})
            kept.sort(key=lambda record: (MODELS.index(record["model"]), NAMES.index(record["tool"])))
            out.write_text("".join(json.dumps(record) + "\n" for record in kept))
            print(name, tool, record.get("error") or f"{record['change']:.1e}", flush=True)


HEAD = """# What other tools find in the same networks

Measured by us: `make study-peers` (`studies/structure_peers.py` says how), seed {seed}, commit `{commit}`, PyTorch
{torch}, rebasin {rebasin}, Torch-Pruning {torch-pruning}, torchvision {torchvision}, timm {timm}, transformers
{transformers}; {machine}, one thread, shared with other jobs.
Networks with random weights and live activations, float64, eval mode,
torchvision's and timm's default sizes (GPT-2 and LSTM small, see `studies/zoo.py`). Records: `structure-peers.jsonl`.

**change**: largest relative change of the output when everything that the tool found is renumbered at random; 1e-9 and
less is rounding. **right alone**: groups that keep the function when renumbered alone, of all groups. **moved**: share
of all entries of parameters and float buffers that the renumbering moved. **log10**: of the number of renumberings, all
that the tool allows, and those in groups that are right. **seconds**: to find the structure, the network being there;
by the clock of a busy machine, so they are rough. **not measured**: the process was ended from outside, or at the limit
of this study, judging included; that says nothing about the tool.

- rebasin permutes weights and biases, and leaves batch-norm statistics to its `recalculate_batch_norms`, which needs
  data; the second figure has them moved by us, as a perfect recalculation would have it. Its README says that
  transformers do not work well.
- Torch-Pruning finds channels that are *removed* together and does not claim that they can be renumbered. We read its
  groups as renumberings (`studies/peer_tools.py` says how), leave out those that reach the output, give it the head
  counts of attention layers, and treat grouped layers as its `BasePruner` does.

"""


def write_page(out: Path, page: Path) -> None:
    """Write the records as Markdown."""
    records = {(r["model"], r["tool"]): r for r in map(json.loads, out.read_text().splitlines())}
    lines = [HEAD.format(**_source(records)) + "## Function kept?\n"]
    lines += ["| network | " + " | ".join(NAMES) + " |", "|---|" + "---|" * len(NAMES)]
    for name in MODELS:
        lines.append(f"| {name} | " + " | ".join(_verdict(records.get((name, tool))) for tool in NAMES) + " |")
    lines.append("| **kept** | " + " | ".join(_score(records, tool) for tool in NAMES) + " |")
    lines += [
        "\n## How much, and how fast\n",
        "| network | tool | right alone | moved | log10 | log10 right | seconds |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for (name, tool), record in records.items():
        lines.append(f"| {name} | {tool} | {_details(record)} |")
    lines += ["\n## What a tool left out or said\n"]
    for (name, tool), record in records.items():
        said = [record["error"]] if "error" in record else [f"{n} groups: {why}" for why, n in record["notes"].items()]
        lines += [f"- {name}, {tool}: {'; '.join(said)}"] if said else []
    page.write_text("\n".join(lines) + "\n")


def _source(records: dict[tuple[str, str], dict[str, Any]]) -> dict[str, str]:
    commits = sorted({r["commit"] for r in records.values()})
    return {**next(iter(records.values())), "commit": ", ".join(commits)}


def _verdict(record: dict[str, Any] | None) -> str:
    if record is None:
        return "not run"
    if "error" in record:
        return _failure(record)
    if record["log10"] == 0:
        return "finds nothing"
    found = f"{record['change']:.0e}"
    fixed = record.get("change_with_statistics", record["change"])
    found += f" (statistics moved: {fixed:.0e})" if "change_with_statistics" in record else ""
    return found if record["change"] <= RIGHT else f"**changed**: {found}"


def _failure(record: dict[str, Any]) -> str:
    """Tell a tool's own failure from a process that was ended from outside, which says nothing about the tool."""
    return "not measured" if _unmeasured(record) else "fails"


def _unmeasured(record: dict[str, Any]) -> bool:
    error = record.get("error", "")
    return error.startswith(NO_ANSWER) or error.endswith("code -9")


def _score(records: dict[tuple[str, str], dict[str, Any]], tool: str) -> str:
    mine = [r for (_, t), r in records.items() if t == tool and not _unmeasured(r)]
    kept = sum(r["change"] <= RIGHT for r in mine if r.get("log10"))
    return f"{kept} of {len(mine)} measured"


def _details(record: dict[str, Any]) -> str:
    if "error" in record:
        return f"{_failure(record)} |  |  |  | "
    fixed = record.get("groups_right_with_statistics")
    more = f" (statistics moved: {fixed})" if fixed is not None else ""
    return (
        f"{record['groups_right']} of {record['groups']}{more} | {record['moved']:.1%} | {record['log10']:.1f} | "
        f"{record['log10_right']:.1f} | {record['seconds']:.2f}"
    )


def main() -> None:
    """Run the study and write its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--tools", nargs="+", choices=NAMES, default=NAMES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    declare_torchvision()
    run(args.out, args.only, args.tools)
    write_page(args.out, args.page)


if __name__ == "__main__":
    main()
