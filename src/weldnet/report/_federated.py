"""Rounds of federated learning: accuracy by round and by what was sent, and differences between pairs of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from weldnet.records import Record
from weldnet.report._numbers import Metric, Value, metric, value_of
from weldnet.report._page import Block, Cell, Column, Figure, Gallery, Row, Section, Table
from weldnet.report._plot import Drawing, Style, axis, is_number, over_repeats, styles
from weldnet.report._summary import REPEATS, SETTING, Key, groups_of, label, method_text, normal, setting_text

__all__ = ["federated", "is_federated"]

_WHERE = (*SETTING, "clients")
_WHO = ("method", "rule", "algorithm")
"""The words that say by which method a run is, the first of them that is there."""
_BASELINES = ("fedavg", "average", "avg", "mean", "naive")


def is_federated(record: Record) -> bool:
    """Say whether a record is about federated learning."""
    if record.kind == "round":
        return True
    return "method" not in record.cell and ("clients" in record.cell or "rule" in record.cell)


@final
@dataclass(frozen=True)
class _Run:
    """The rounds of one run: of each its number, its numbers, and the bytes sent up to its end."""

    repeat: Key
    rounds: tuple[tuple[int, Mapping[str, float], float], ...]

    def at(self, name: str) -> dict[int, float]:
        return {number: values[name] for number, values, _ in self.rounds if name in values}

    def within(self, sent: float, name: str) -> float | None:
        """Return a number after the last round that is paid for by so many bytes."""
        paid = [values[name] for _, values, total in self.rounds if total <= sent * (1 + 1e-9) and name in values]
        return paid[-1] if paid else None

    @property
    def sent(self) -> float:
        return self.rounds[-1][2]


def federated(records: Sequence[Record]) -> list[Section]:
    """Return the section on federated learning: for each setting curves, the end, and paired differences."""
    rounds = [record for record in records if record.kind == "round"]
    published = [record for record in records if record.kind == "published" and is_federated(record)]
    blocks: list[Block] = []
    for where, group in groups_of(rounds, _where).items():
        blocks += _setting(where, _told_apart({v: _runs(members) for v, members in groups_of(group, _variant).items()}))
    if published:
        blocks.append(_published(published))
    if not blocks:
        return []
    intro = ""
    if rounds:
        intro = (
            "A difference is taken between runs of the same seed, which have the same data and the same clients, and "
            "then averaged: it says more than the difference of two means."
        )
    return [Section(name="federated", title="Federated learning", blocks=tuple(blocks), intro=intro)]


def _where(record: Record) -> Key:
    return tuple((word, record.cell[word]) for word in _WHERE if word in record.cell)


def _variant(record: Record) -> Key:
    cell = normal(record.cell)
    if "method" in cell:
        return tuple((word, cell[word]) for word in ("method", "repair") if word in cell)
    left_out = {*_WHERE, *REPEATS, "round", "stage", "networks"}
    order = ("rule", "algorithm", "initialisation")
    words = [*(word for word in order if word in cell), *(word for word in cell if word not in order)]
    return tuple((word, cell[word]) for word in words if word not in left_out)


def _told_apart(variants: Mapping[Key, list[_Run]]) -> dict[Key, list[_Run]]:
    """Leave out of the variants what all of them have in common, but for the rule."""
    common = set.intersection(*map(set, variants)) if len(variants) > 1 else set[Any]()
    return {tuple(e for e in v if e[0] in ("rule", "method") or e not in common): runs for v, runs in variants.items()}


def _runs(records: Sequence[Record]) -> list[_Run]:
    found: list[_Run] = []
    repeats = groups_of(records, lambda r: (*((word, r.cell.get(word)) for word in REPEATS), ("", r.seed)))
    for repeat, members in repeats.items():
        rounds: list[tuple[int, Mapping[str, float], float]] = []
        sent = 0.0
        numbered = [record for record in members if is_number(record.cell.get("round"))]
        for record in sorted(numbered, key=_number):
            values = _values(record)
            sent += values.get("bytes", 0.0)
            rounds.append((_number(record), values, sent))
        if rounds:
            found.append(_Run(repeat, tuple(rounds)))
    return found


def _values(record: Record) -> dict[str, float]:
    """Return a round's numbers; what went up and down is what was sent, the mean over clients what was moved."""
    values = {name: float(value) for name, value in record.values.items() if is_number(value) and value is not None}
    if "bytes" not in values and {"bytes_up", "bytes_down"} & set(values):
        values["bytes"] = values.get("bytes_up", 0.0) + values.get("bytes_down", 0.0)
    moved = record.extra.get("moved")
    if "moved" not in values and isinstance(moved, Mapping):
        mean = value_of(share for share in moved.values() if is_number(share))
        values |= {} if mean is None else {"moved": mean.mean}
    return values


def _number(record: Record) -> int:
    found = record.cell["round"]
    assert isinstance(found, int | float)
    return int(found)


def _name(variant: Key) -> str:
    words = dict(variant)
    named = [method_text(str(words.pop(word))) for word in ("rule", "algorithm") if word in words]
    first = " + ".join(dict.fromkeys(named))
    rest = label(tuple(words.items()))
    return ", ".join(filter(None, [first, rest])) or "run"


def _setting(where: Key, variants: Mapping[Key, list[_Run]]) -> list[Block]:
    variants = {variant: runs for variant, runs in variants.items() if runs}
    name = next((n for n in ("accuracy", "loss") if any(run.at(n) for runs in variants.values() for run in runs)), None)
    if name is None:
        return []
    clients = dict(where).get("clients")
    place = ", ".join(filter(None, [setting_text(where), f"{clients} clients" if clients is not None else ""]))
    looks = styles(variants, by=(next((w for w in _WHO if any(w in dict(v) for v in variants)), "algorithm"),))
    baseline = _baseline(variants)
    shown = metric(name)
    figures: list[Figure | None] = [_by_round(place, variants, looks, shown)]
    if any(run.sent for runs in variants.values() for run in runs):
        figures.append(_by_bytes(place, variants, looks, shown))
    if len(variants) > 1:
        figures.append(_differences(place, variants, looks, shown, baseline))
    if any(run.at("moved") for runs in variants.values() for run in runs):
        figures.append(_by_round(place, variants, looks, metric("moved")))
    found = [figure for figure in figures if figure is not None]
    caption = "Lines are means over seeds, bands one standard deviation."
    return [_table(place, variants, shown, baseline), Gallery(figures=tuple(found), caption=caption)]


def _baseline(variants: Mapping[Key, list[_Run]]) -> Key:
    """Return what the others are compared with: plain averaging with plain training, else the first."""

    def plainness(variant: Key) -> tuple[bool, bool]:
        words = {word: str(entry).lower() for word, entry in variant}
        plain = next((words[word] for word in _WHO if word in words), "") in _BASELINES
        return not plain, words.get("algorithm", "fedavg") not in (*_BASELINES, "sgd", "plain", "none")

    return min(variants, key=plainness)


def _pairs(runs: Sequence[_Run], others: Sequence[_Run]) -> list[tuple[_Run, _Run]]:
    by_repeat = {run.repeat: run for run in others}
    return [(run, by_repeat[run.repeat]) for run in runs if run.repeat in by_repeat]


# -- table -----------------------------------------------------------------------------------------


def _table(place: str, variants: Mapping[Key, list[_Run]], shown: Metric, baseline: Key) -> Table:
    last = min(max(run.at(shown.key), default=0) for runs in variants.values() for run in runs)
    budgets = [run.sent for runs in variants.values() for run in runs]
    budget = min(budgets) if min(budgets) else None
    ends = {variant: [_at_round(run, last, shown.key) for run in runs] for variant, runs in variants.items()}
    paid = {
        v: [None if budget is None else run.within(budget, shown.key) for run in runs] for v, runs in variants.items()
    }
    best_end, best_paid = _best(ends, shown), _best(paid, shown)
    rows: list[Row] = []
    for variant, runs in variants.items():
        pairs = [] if variant == baseline else _pairs(runs, variants[baseline])
        cells = [Cell(text=_name(variant), key=_colour_word(variant)), Cell(text=str(len(runs)), number=len(runs))]
        cells.append(_mean(ends[variant], shown, best=variant == best_end))
        cells.append(
            _difference([(_at_round(a, last, shown.key), _at_round(b, last, shown.key)) for a, b in pairs], shown)
        )
        if budget is not None:
            cells.append(_mean(paid[variant], shown, best=variant == best_paid))
            both = [(a.within(budget, shown.key), b.within(budget, shown.key)) for a, b in pairs]
            cells.append(_difference(both, shown))
        cells.append(_total(runs, "bytes"))
        cells.append(_total(runs, "seconds"))
        rows.append(Row(cells=tuple(cells)))
    change = f"change against {_name(baseline)}"
    columns = [Column(label="rule and training"), Column(label="runs")]
    group = f"after round {last}"
    columns += [
        Column(label=shown.heading, group=group, origin="measured"),
        Column(label="paired change", group=group, hint=change),
    ]
    if budget is not None:
        group = f"after {metric('bytes').with_unit(budget)} sent"
        columns += [
            Column(label=shown.heading, group=group, origin="measured"),
            Column(label="paired change", group=group, hint=change),
        ]
    columns += [Column(label="sent, MB", group="whole run"), Column(label="time, s", group="whole run")]
    return Table(
        title=place or "Runs",
        caption=f"Mean ± sample standard deviation over runs. Paired changes are against {_name(baseline)}, run by "
        "run of the same seed, in percentage points for shares; in small how many of the pairs are better.",
        columns=tuple(columns),
        rows=tuple(rows),
    )


def _colour_word(variant: Key) -> str:
    words = dict(variant)
    return str(next((words[word] for word in _WHO if word in words), ""))


def _at_round(run: _Run, number: int, name: str) -> float | None:
    return run.at(name).get(number)


def _best(found: Mapping[Key, Sequence[float | None]], shown: Metric) -> Key | None:
    means = {variant: value.mean for variant, numbers in found.items() if (value := value_of(numbers)) is not None}
    choose = max if shown.better == "high" else min
    return choose(means, key=lambda variant: means[variant]) if len(means) > 1 else None


def _mean(numbers: Sequence[float | None], shown: Metric, *, best: bool = False) -> Cell:
    value = value_of(numbers)
    if value is None:
        return Cell()
    spread = "" if value.spread is None else shown.text(value.spread)
    return Cell(text=shown.text(value.mean), spread=spread, number=value.mean, best=best, note=f"mean of {value.count}")


def _difference(pairs: Sequence[tuple[float | None, float | None]], shown: Metric) -> Cell:
    """Write the mean difference of pairs with its deviation, and how many of them are better."""
    each = [mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None]
    value = value_of(each)
    if value is None:
        return Cell()
    better = sum(one > 0 if shown.better == "high" else one < 0 for one in each)
    spread = "" if value.spread is None else shown.text(value.spread)
    text = ("+" if value.mean > 0 else "") + shown.text(value.mean)
    return Cell(text=text.replace("-", "\u2212"), spread=spread, number=value.mean, mark=f"{better}/{len(each)}")


def _total(runs: Sequence[_Run], name: str) -> Cell:
    found = [sum(run.at(name).values()) for run in runs if run.at(name)]
    return replace(_mean(found, metric(name)), spread="") if found else Cell()


def _published(records: Sequence[Record]) -> Table:
    """Return what papers say, apart from everything that was measured."""
    sources = list(dict.fromkeys(record.source for record in records))
    signs = {source: "abcdefghijklmnopqrstuvwxyz"[index % 26] for index, source in enumerate(sources)}
    places = list(dict.fromkeys((_where(record), record.source) for record in records))
    variants = groups_of(records, _variant)
    shown = metric("accuracy")
    rows: list[Row] = []
    for variant, group in variants.items():
        at = {(_where(record), record.source): record.values.get("accuracy") for record in group}
        cells = [Cell(text=shown.text(at.get(slot)), number=at.get(slot)) for slot in places]
        rows.append(Row(cells=(Cell(text=_name(variant), key=_colour_word(variant)), *cells)))
    columns = [Column(label="rule and training")]
    for where, source in places:
        clients = dict(where).get("clients")
        heading = ", ".join(filter(None, [setting_text(where), f"{clients} clients" if clients is not None else ""]))
        columns.append(Column(label=f"{heading} [{signs[source]}]", group="published", origin="published"))
    return Table(
        title=f"Published: {shown.heading}",
        caption="From papers, under their own conditions.",
        columns=tuple(columns),
        rows=tuple(rows),
        notes=tuple((signs[source], source) for source in sources),
    )


# -- figures ---------------------------------------------------------------------------------------


def _by_round(place: str, variants: Mapping[Key, list[_Run]], looks: Mapping[Key, Style], shown: Metric) -> Figure:
    curves = {v: over_repeats([_line(run, shown.key) for run in runs]) for v, runs in variants.items()}
    return _figure(place, curves, looks, shown, f"{shown.label.capitalize()} by round", axis("round"))


def _line(run: _Run, name: str) -> tuple[list[Any], list[Any]]:
    found = run.at(name)
    return list(found), list(found.values())


def _by_bytes(place: str, variants: Mapping[Key, list[_Run]], looks: Mapping[Key, Style], shown: Metric) -> Figure:
    """Draw what a number is worth in bytes: rounds of all runs are joined, each at the mean of what was sent."""
    curves: dict[Key, tuple[list[float], list[Value]]] = {}
    for variant, runs in variants.items():
        numbers, values = over_repeats([_line(run, shown.key) for run in runs])
        sent = {number: [t for run in runs for n, _, t in run.rounds if n == number] for number in map(int, numbers)}
        curves[variant] = ([metric("bytes").scale * sum(sent[int(n)]) / len(sent[int(n)]) for n in numbers], values)
    return _figure(place, curves, looks, shown, f"{shown.label.capitalize()} by what was sent", axis("sent in all, MB"))


def _differences(
    place: str, variants: Mapping[Key, list[_Run]], looks: Mapping[Key, Style], shown: Metric, baseline: Key
) -> Figure | None:
    curves: dict[Key, tuple[list[float], list[Value]]] = {}
    for variant, runs in variants.items():
        lines: list[tuple[list[Any], list[Any]]] = []
        for mine, theirs in [] if variant == baseline else _pairs(runs, variants[baseline]):
            a, b = mine.at(shown.key), theirs.at(shown.key)
            both = [number for number in a if number in b]
            lines.append((both, [a[number] - b[number] for number in both]))
        curves[variant] = over_repeats(lines)
    if not any(x for x, _ in curves.values()):
        return None
    title = f"Paired change of {shown.label} against {_name(baseline)}"
    unit = Metric(
        shown.key, "change", "points" if shown.unit == "%" else shown.unit, shown.scale, shown.form, shown.better
    )
    return _figure(place, curves, looks, unit, title, axis("round"), zeroline=True)


def _figure(
    place: str,
    curves: Mapping[Key, tuple[list[float], list[Value]]],
    looks: Mapping[Key, Style],
    shown: Metric,
    title: str,
    across: Mapping[str, Any],
    *,
    zeroline: bool = False,
) -> Figure:
    drawing = Drawing()
    alt: list[str] = []
    for variant, (x, values) in curves.items():
        if x:
            drawing.line(_name(variant), looks[variant], x, values, shown.scale)
            alt.append(f"{_name(variant)} {shown.text(values[0].mean)} first, {shown.text(values[-1].mean)} last")
    return drawing.figure(
        name=f"{title}-{place}",
        title=title,
        caption=place,
        alt=f"{title}: {'; '.join(alt)}.",
        layout={"xaxis": dict(across), "yaxis": axis(shown.heading, zeroline=zeroline)},
    )
