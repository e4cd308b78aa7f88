"""From the records of a run to a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from weldnet._words import counted
from weldnet.errors import RecordError
from weldnet.records import Record, Records
from weldnet.report._couplings import couplings
from weldnet.report._curves import curves, training
from weldnet.report._federated import federated, is_federated
from weldnet.report._figures import standings, sweeps
from weldnet.report._insides import spaces, variances
from weldnet.report._page import Block, Gallery, Page, Section
from weldnet.report._plot import numbered
from weldnet.report._provenance import provenance, section, settings
from weldnet.report._results import compared, glance, measured
from weldnet.report._summary import SYNTHETIC, Summary, summarise

__all__ = ["build"]


def build(records: Records, *, title: str | None = None) -> Page:
    """Make a page of records. Sections appear only where there are records for them.

    Args:
        records: of a run, as :func:`weldnet.records.read` gives them.
        title: of the page; by default what the run says.

    Raises:
        RecordError: there is no record.

    >>> from weldnet.records import Record
    >>> page = build(Records((Record(kind="result", cell={"method": "gamf"}, values={"accuracy": 0.5}),)))
    >>> [section.name for section in page.sections]
    ['glance', 'measurements', 'provenance']
    """
    if not len(records):
        skipped = f"; {counted(records.corrupt, 'line')} could not be read" if records.corrupt else ""
        raise RecordError(f"there are no records to report{skipped}; run the study first")
    runs = records.of("run")
    plain = [record for record in records.of("result", "published") if not is_federated(record)]
    summaries = summarise(plain)
    made = provenance(records)
    methods = compared(summaries)
    sections = [
        *glance(summaries),
        *_with(methods, standings(summaries), Section(name="methods", title="Methods compared", blocks=())),
        *federated(records.all),
        *sweeps(summaries),
        *curves(records.of("curve")),
        *variances(summaries),
        *spaces(summaries),
        *couplings(records.of("couplings")),
        *training(records.of("network")),
        *measured(summaries),
        *settings(runs),
        section(made),
    ]
    return Page(
        title=title or _first(runs, "title") or "weldnet report",
        subtitle=_subtitle(records, runs),
        sections=_unique(sections),
        warnings=tuple(_warnings(records, runs)),
        notes=tuple(dict.fromkeys(note[:1].upper() + note[1:] for note in _notes(runs))),
        numbers=tuple(entry for summary in summaries for entry in _numbers(summary)),
        provenance=made,
    )


def _with(sections: list[Section], more: Sequence[Block], empty: Section) -> list[Section]:
    """Add blocks to a section, which is made for them if there is none."""
    if not more:
        return sections
    first = sections[0] if sections else empty
    return [replace(first, blocks=(*first.blocks, *more))]


def _first(runs: Iterable[Record], name: str) -> str:
    return next((str(run.extra[name]) for run in runs if run.extra.get(name)), "")


def _subtitle(records: Records, runs: Sequence[Record]) -> str:
    counts = {kind: sum(record.kind == kind for record in records) for kind in ("network", "result", "round")}
    words = [counted(count, kind) for kind, count in counts.items() if count]
    scale = _first(runs, "scale")
    return ", ".join([*words, *([f"scale {scale}"] if scale else [])])


def _warnings(records: Records, runs: Sequence[Record]) -> list[str]:
    found = [text for run in runs for text in _texts(run.extra.get("warning"))]
    if any(str(record.cell.get("dataset", "")).endswith(SYNTHETIC) for record in records):
        found.append("Synthetic data: these numbers show that the way works. They are no results.")
    if _first(runs, "scale") == "smoke":
        found.append("Scale smoke: a few minutes' work that shows that everything runs, not how good it is.")
    if records.corrupt:
        found.append(
            f"{counted(records.corrupt, 'line')} of the records could not be read; {_they(records.corrupt)} left out."
        )
    failed = sum(1 for record in records.of("result") if record.extra.get("error"))
    if failed:
        found.append(f"{counted(failed, 'result')} failed; the reasons are under All measurements.")
    return list(dict.fromkeys(found))


def _they(count: int) -> str:
    return "it is" if count == 1 else "they are"


def _notes(runs: Iterable[Record]) -> Iterable[str]:
    for run in runs:
        yield from _texts(run.extra.get("about"))
        yield from _texts(run.extra.get("notes"))


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value] if value else []
    return [str(entry) for entry in value] if isinstance(value, list | tuple) else []


def _unique(sections: Sequence[Section]) -> tuple[Section, ...]:
    """Give every figure a name of its own."""
    figures = [f for s in sections for block in s.blocks if isinstance(block, Gallery) for f in block.figures]
    named = iter(numbered(figures))
    found: list[Section] = []
    for entry in sections:
        blocks = [
            replace(block, figures=tuple(next(named) for _ in block.figures)) if isinstance(block, Gallery) else block
            for block in entry.blocks
        ]
        found.append(replace(entry, blocks=tuple(blocks)))
    return tuple(found)


def _numbers(summary: Summary) -> Iterable[Mapping[str, Any]]:
    for name, value in summary.values.items():
        yield {
            "origin": "published" if summary.published else "measured",
            **summary.cell,
            "metric": name,
            "mean": value.mean,
            "deviation": value.spread,
            "n": value.count,
            "source": summary.source,
        }
