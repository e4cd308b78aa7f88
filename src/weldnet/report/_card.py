"""The card of a fused network: the README beside its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from weldnet._version import __version__
from weldnet._words import counted

if TYPE_CHECKING:
    from weldnet.fusion import Fusion, Row
    from weldnet.streaming import Streamed

__all__ = ["CARD_MARK", "card"]

CARD_MARK = "library_name: weldnet"
"""What tells a card of weldnet's from other files of its name."""


def card(
    fusion: Fusion | Streamed,
    *,
    config: str,
    files: Sequence[str] = (),
    model: str = "",
    loads: str = "",
    weights: str = "model.safetensors",
) -> str:
    """Write the card of a fused network as Markdown with a YAML head, as model hubs read it.

    Args:
        fusion: what :func:`weldnet.fuse` gave.
        config: the settings as YAML, which make the network again.
        files: the parents' checkpoints, in their order.
        model: what builds the network, such as ``lenet``; named in how to load it.
        loads: Python that loads the network; by default from ``model`` and ``weights``.
        weights: the file beside the card that holds the weights.
    """
    report = fusion.report
    names = " and ".join(_code(name) for name in fusion.parents)
    parts = [
        f"---\n{CARD_MARK}\ntags:\n- model-fusion\n---",
        f"# {names}, fused",
        f"One network of {report.parameters:,} parameters, made of {counted(len(fusion.parents), 'trained network')} "
        f"by weldnet {__version__}.",
        "## Scores",
        _scores(report.rows),
        *(_list(report.notes) if report.notes else []),
        "## Parents",
        _parents(fusion, files),
        "## How it was made",
        _table([("method", report.method), ("repair", report.repair), *_facts(fusion)]),
        "`config.yaml` holds these settings; `weldnet fuse --config config.yaml -o OUT` makes the network again. Paths "
        f"in it count from the folder in which weldnet is run:\n\n```yaml\n{config.rstrip()}\n```",
        "## How to load it",
        f"```python\n{loads or _loads(fusion, model, weights)}\n```",
        "## Licence",
        "weldnet puts no licence on this network. It is made of its parents' weights, so what their licences, and "
        "those of their training data, allow and ask for holds here too. Check them before passing it on.",
    ]
    return "\n\n".join(parts) + "\n"


def _scores(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    if not names:
        return "It was not scored: no labelled data were given."
    heading = ["network", "role", *(name.replace("_", " ") for name in names)]
    body = [
        [_code(row.name), row.role, *(_score(name, row.scores.get(name)) for name in names)]
        for row in rows
        if row.scores
    ]
    return _rows(heading, body)


def _score(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2%}" if name == "accuracy" else f"{value:.4f}"


def _parents(fusion: Fusion | Streamed, files: Sequence[str]) -> str:
    provenance = json.loads(fusion.provenance(files)["parents"])
    rows = [row for row in fusion.report.rows if row.role == "parent"]
    body: list[list[str]] = []
    for row, entry in zip(rows, provenance, strict=True):
        digest = entry.get("sha256") or entry.get("tensors_sha256", "")
        equivalence = "not measured" if row.equivalence is None else f"{row.equivalence:.1e}"
        moved = "" if row.moved is None else f"{row.moved:.1%}"
        name = _code(entry.get("file") or row.name)
        body.append([name, _code(digest), f"{row.weight or 0:.3g}", moved, equivalence])
    return _rows(["parent", "SHA-256", "share", "units moved", "equivalence error"], body) + (
        "\n\nThe equivalence error is the largest relative change of a parent's output when its units were renumbered."
    )


def _facts(fusion: Fusion | Streamed) -> list[tuple[str, str]]:
    report = fusion.report
    structure = f"{counted(report.spaces, 'space')}, {report.free_share:.1%} of the hidden positions free"
    found = [("structure", structure), ("check", report.check)]
    if report.size is not None:
        found.append(("size", str(report.size)))
    return [*found, ("seed", str(fusion.config.get("seed", 0)))]


def _loads(fusion: Fusion | Streamed, model: str, weights: str) -> str:
    builds = f"the network that {model} builds" if model else "a network of the parents' class"
    wider = ", made as wide as the file says" if fusion.widths else ""
    return f'import weldnet\n\n# model is {builds}{wider}\nmodel = weldnet.load_model("{weights}", model)'


# -- Markdown --------------------------------------------------------------------------------------


def _table(entries: Sequence[tuple[str, str]]) -> str:
    return _rows(["", ""], [[name, " ".join(text.split())] for name, text in entries])


def _rows(heading: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _list(entries: Sequence[str]) -> list[str]:
    return ["\n".join(f"- {' '.join(entry.split())}" for entry in entries)]


def _code(text: str) -> str:
    """Write a name so that nothing in it counts as Markdown."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"
