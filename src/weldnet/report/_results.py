"""The tables of results: at a glance, beside published numbers, and everything that was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from weldnet._words import counted
from weldnet.report._numbers import Metric, Value, by_order, metric
from weldnet.report._page import Block, Cell, Column, Row, Section, Stats, Table
from weldnet.report._summary import (
    Key,
    Summary,
    condition_order,
    condition_text,
    groups_of,
    label,
    method_order,
    setting_text,
)

__all__ = ["best_of", "compared", "glance", "measured", "primary", "value_cell"]

#: Of these the best is set in bold; of seconds and memory it says little.
_JUDGED = ("accuracy", "loss", "calibration_error", "barrier")


def primary(summaries: Iterable[Summary]) -> str | None:
    """Return the number by which results are judged: the accuracy, or the loss where there is none."""
    names = {name for summary in summaries for name in summary.values}
    return next((name for name in ("accuracy", "loss") if name in names), None)


def glance(summaries: Sequence[Summary]) -> list[Section]:
    """Return the first section: for each setting and condition the best fused network beside the references."""
    ours = [summary for summary in summaries if not summary.published]
    name = primary(ours)
    if name is None:
        return []
    found = groups_of(ours, lambda summary: (*summary.setting, *summary.condition))
    if len(found) == 1:
        block: Block | None = _stats(next(iter(found.values())), metric(name))
    else:
        block = _glance_table(found, metric(name))
    return [Section(name="glance", title="At a glance", blocks=(block,))] if block else []


def _stats(group: Sequence[Summary], shown: Metric) -> Stats | None:
    best = best_of(group, shown)
    entries = [("Fused", best, label(tuple(e for e in best.row if e[0] != "network")))] if best else []
    named = [(text, found) for text, found in _references(group, shown) if found is not None]
    entries += [(text, found, str(found.cell.get("network", "")) if found.reference else "") for text, found in named]
    cells = [(t, _large(found.values[shown.key], shown), "" if r == t.lower() else r) for t, found, r in entries]
    return Stats(entries=tuple(cells), title=shown.label.capitalize()) if cells else None


def _large(value: Value, shown: Metric) -> Cell:
    spread = shown.text(value.spread) if value.spread is not None else ""
    return Cell(text=shown.with_unit(value.mean), spread=spread, number=value.mean)


def _glance_table(found: dict[Key, list[Summary]], shown: Metric) -> Table | None:
    names = ("Best parent", "Ensemble", "Naive average")
    common = set.intersection(*(set(group[0].setting) for group in found.values()))
    rows: list[Row] = []
    for group in found.values():
        best = best_of(group, shown)
        if best is None:
            continue
        where = setting_text(tuple(entry for entry in best.setting if entry not in common))
        cells = [
            Cell(text=", ".join(filter(None, [where, condition_text(best.condition)])) or "all"),
            Cell(text=label(best.row), key=best.method),
            value_cell(best, shown),
        ]
        beside = [*group, *_same_parents(group, found)]
        cells += [value_cell(other, shown) if other else Cell() for _, other in _references(beside, shown)]
        rows.append(Row(cells=tuple(cells)))
    if not rows:
        return None
    everywhere = setting_text(tuple(entry for entry in _first_setting(found) if entry in common))
    numbers = [Column(label=text, origin="measured") for text in ("best fused", *names)]
    return Table(
        title=": ".join(filter(None, [everywhere, shown.heading])),
        caption="Measured here; of the fused networks the one with the best mean. All others are below.",
        columns=(Column(label="networks"), Column(label="best method"), *numbers),
        rows=tuple(rows),
        words=2,
    )


def _same_parents(group: Sequence[Summary], found: dict[Key, list[Summary]]) -> list[Summary]:
    """Return the parents and their ensemble, which no size and no fine-tuning changes, where a group has none."""
    if any(summary.reference for summary in group):
        return []
    networks = {(summary.setting, summary.part(("networks",))) for summary in group}
    everything = (summary for others in found.values() for summary in others if summary.reference)
    return [summary for summary in everything if (summary.setting, summary.part(("networks",))) in networks]


def _first_setting(found: dict[Key, list[Summary]]) -> Key:
    return next(iter(found.values()))[0].setting


def _references(group: Sequence[Summary], shown: Metric) -> list[tuple[str, Summary | None]]:
    """Return best parent, ensemble and naive average, where they were measured; the best individual for a parent."""
    with_value = [summary for summary in group if shown.key in summary.values]
    by_method = {summary.method: summary for summary in reversed(with_value)}
    singles = [summary for summary in with_value if summary.method == "individual"]
    parent = by_method.get("best parent") or _best(singles, shown)
    return [("Best parent", parent), ("Ensemble", by_method.get("ensemble")), ("Naive average", by_method.get("naive"))]


def best_of(group: Sequence[Summary], shown: Metric) -> Summary | None:
    """Return the best of what competes: fused networks, the naive average among them only if it is alone."""
    fused = [summary for summary in group if not summary.reference and shown.key in summary.values]
    return _best([summary for summary in fused if summary.method != "naive"] or fused, shown)


def _best(group: Sequence[Summary], shown: Metric) -> Summary | None:
    sign = -1 if shown.better == "high" else 1
    return min(group, key=lambda summary: sign * summary.values[shown.key].mean, default=None)


# -- beside published numbers ----------------------------------------------------------------------


def compared(summaries: Sequence[Summary]) -> list[Section]:
    """Return the comparison of methods: one table a setting and number, measured and published columns apart."""
    blocks: list[Block] = []
    for setting, group in groups_of(summaries, lambda summary: summary.setting).items():
        published = [summary for summary in group if summary.published]
        conditions = {summary.condition for summary in group}
        name = primary(group)
        names = by_order([*(key for summary in published for key in summary.values), *([name] if name else [])])
        if name is not None and (published or len(conditions) > 1):
            blocks += [_comparison(setting, group, metric(key)) for key in names]
    intro = (
        "Measured numbers and numbers from papers stand in separate columns and are never mixed. Bold: the best fused "
        "network of a column; parents and their ensemble do not compete."
    )
    return [Section(name="methods", title="Methods compared", blocks=tuple(blocks), intro=intro)] if blocks else []


def _comparison(setting: Key, group: Sequence[Summary], shown: Metric) -> Table:
    group = [summary for summary in group if shown.key in summary.values or summary.failed]
    origin = _origins(group)
    conditions = sorted({summary.condition for summary in group}, key=condition_order)
    origins = list(dict.fromkeys(["", *(origin(summary) for summary in group)]))
    at = {(summary.row, summary.condition, origin(summary)): summary for summary in group}
    slots = [(c, o) for c in conditions for o in origins if any((row, c, o) in at for row, _, _ in at)]
    references = {summary.row for summary in group if summary.reference}
    sources = list(dict.fromkeys(summary.source for summary in group if summary.published and summary.source))
    winners = {slot: _winner([s for s in group if (s.condition, origin(s)) == slot], shown) for slot in slots}
    counts = {_count(summary, shown) for summary in group if not summary.published} - {0}
    body: list[Row] = []
    for row in dict.fromkeys(summary.row for summary in sorted(group, key=method_order)):
        cells = [Cell(text=label(row), key=str(dict(row).get("method", "")))]
        for slot in slots:
            found, best = at.get((row, *slot)), row in winners[slot]
            cells.append(_slot_cell(found, shown, sources, best=best, count=len(counts) > 1))
        body.append(Row(cells=tuple(cells), reference=row in references))
    columns = [Column(label="method")]
    for condition, from_ in slots:
        word = "published" if from_ else "measured"
        columns.append(Column(label=word, group=condition_text(condition) or shown.label, origin=word))
    return Table(
        title=f"{setting_text(setting)}: {shown.heading}" if setting else shown.heading.capitalize(),
        caption=_counts_text(counts),
        columns=tuple(columns),
        rows=tuple(body),
        notes=(*((_sign(index), source) for index, source in enumerate(sources)), *_remarks(group)),
    )


def _remarks(group: Sequence[Summary]) -> list[tuple[str, str]]:
    """Return what records say about published numbers, beside their source."""
    found = [
        f"{label(summary.row)}: {record.extra['note']}"
        for summary in group
        for record in summary.records
        if summary.published and record.extra.get("note")
    ]
    return [("", text) for text in dict.fromkeys(found)]


def _origins(group: Sequence[Summary]) -> Callable[[Summary], str]:
    """Say where a number comes from: nothing for measured ones. Sources share a column unless two have the same row."""
    published = [summary for summary in group if summary.published]
    clash = len(published) > len({(summary.row, summary.condition) for summary in published})
    return lambda summary: "" if not summary.published else (f"published: {summary.source}" if clash else "published")


def _winner(group: Sequence[Summary], shown: Metric) -> set[Key]:
    """Return the rows of the best fused network of a column, of several if they are written alike.

    The naive average competes too; a single network is no best one.
    """
    rivals = [summary for summary in group if not summary.reference and shown.key in summary.values]
    best = _best(rivals, shown) if shown.better and len(rivals) > 1 else None
    if best is None:
        return set()
    text = shown.text(best.values[shown.key].mean)
    return {summary.row for summary in rivals if shown.text(summary.values[shown.key].mean) == text}


def _slot_cell(found: Summary | None, shown: Metric, sources: list[str], *, best: bool, count: bool) -> Cell:
    if found is None:
        return Cell()
    if shown.key not in found.values:
        return Cell(text="failed", note=found.failed[0])
    mark = _sign(sources.index(found.source)) if found.published and found.source else ""
    return value_cell(found, shown, best=best, mark=mark, count=count)


def value_cell(found: Summary, shown: Metric, *, best: bool = False, mark: str = "", count: bool = False) -> Cell:
    """Return the cell of a mean; ``count`` puts the number of values beside it."""
    value = found.values[shown.key]
    remarks = [f"mean of {value.count}"] if value.count > 1 else []
    remarks += [f"{len(found.failed)} failed"] if found.failed else []
    return Cell(
        text=shown.text(value.mean),
        spread="" if value.spread is None else shown.text(value.spread),
        number=value.mean,
        best=best,
        mark=mark or (f"n={value.count}" if count else ""),
        note=", ".join(remarks),
    )


def _count(summary: Summary, shown: Metric) -> int:
    return summary.values[shown.key].count if shown.key in summary.values else 0


def _counts_text(counts: set[int]) -> str:
    if not counts:
        return "Nothing of this was measured here."
    if counts == {1}:
        return "One value each: no deviation can be given."
    if len(counts) == 1:
        return f"Mean ± sample standard deviation over {counts.pop()} repeats (groups of networks or seeds)."
    return "Mean ± sample standard deviation over n repeats (groups of networks or seeds)."


def _sign(index: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[index] if index < 26 else str(index + 1)


# -- everything ------------------------------------------------------------------------------------


def measured(summaries: Sequence[Summary]) -> list[Section]:
    """Return everything that was measured, one table a setting, and what failed."""
    ours = [summary for summary in summaries if not summary.published]
    blocks: list[Block] = []
    for setting, group in groups_of(ours, lambda summary: summary.setting).items():
        if any(summary.values for summary in group):
            blocks.append(_everything(setting, group))
    failures = _failures(ours)
    blocks += [failures] if failures else []
    return [Section(name="measurements", title="All measurements", blocks=tuple(blocks))] if blocks else []


def _everything(setting: Key, group: Sequence[Summary]) -> Table:
    group = [summary for summary in group if summary.values]
    metrics = [metric(key) for key in by_order(key for summary in group for key in summary.values)]
    conditions = len({summary.condition for summary in group}) > 1
    repeats = sorted({summary.repeats for summary in group})
    winners = {
        (condition, shown.key): _winner([summary for summary in group if summary.condition == condition], shown)
        for condition in {summary.condition for summary in group}
        for shown in metrics
        if shown.key in _JUDGED
    }
    rows: list[Row] = []
    for summary in group:
        cells = [Cell(text=label(summary.row), key=summary.method)]
        cells += [Cell(text=condition_text(summary.condition))] if conditions else []
        cells += [Cell(text=str(summary.repeats), number=summary.repeats)] if len(repeats) > 1 else []
        for shown in metrics:
            best = summary.row in winners.get((summary.condition, shown.key), ())
            cells.append(value_cell(summary, shown, best=best) if shown.key in summary.values else Cell())
        rows.append(Row(cells=tuple(cells), reference=summary.reference))
    words = [Column(label="network"), *([Column(label="fused")] if conditions else [])]
    columns = [*words, *([Column(label="n")] if len(repeats) > 1 else [])]
    columns += [Column(label=shown.heading, origin="measured") for shown in metrics]
    counts = {value.count for summary in group for value in summary.values.values()}
    return Table(
        title=setting_text(setting) or "Networks",
        caption="" if counts == {1} else _counts_text({1, *repeats} if len(repeats) > 1 else set(repeats)),
        columns=tuple(columns),
        rows=tuple(rows),
        words=len(words),
    )


def _failures(summaries: Sequence[Summary]) -> Table | None:
    rows: list[Row] = []
    for summary in summaries:
        for reason in dict.fromkeys(summary.failed):
            count = summary.failed.count(reason)
            cells = [
                Cell(text=setting_text(summary.setting)),
                Cell(text=condition_text(summary.condition)),
                Cell(text=label(summary.row), key=summary.method),
                Cell(text=reason),
                Cell(text=f"{count} of {summary.repeats}", number=count),
            ]
            rows.append(Row(cells=tuple(cells)))
    if not rows:
        return None
    columns = tuple(Column(label=text) for text in ("networks", "fused", "method", "reason", "times"))
    total = sum(len(summary.failed) for summary in summaries)
    return Table(title=f"Failed: {counted(total, 'result')}", columns=columns, rows=tuple(rows), words=4)
