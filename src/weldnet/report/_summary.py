"""From records to means: what belongs together, in which order, under which names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, final

from weldnet.records import Record
from weldnet.report._numbers import Value, by_order, value_of

__all__ = [
    "CONDITION",
    "FEDERATED",
    "REFERENCES",
    "REPEATS",
    "SETTING",
    "SYNTHETIC",
    "Cell",
    "Key",
    "Summary",
    "condition_order",
    "condition_text",
    "groups_of",
    "label",
    "method_of",
    "method_order",
    "method_text",
    "normal",
    "setting_text",
    "summarise",
]

Scalar = str | int | float | bool | None
_T = TypeVar("_T")
Key = tuple[tuple[str, Scalar], ...]

SETTING = ("dataset", "partition", "architecture")
"""The words that say which networks are compared."""
CONDITION = ("networks", "size", "stage")
"""The words that say what was to be done with them."""
FEDERATED = (
    *("clients", "rule", "algorithm", "initialisation", "round", "server_optimiser", "align_at", "local_epochs"),
    "participation",
)
"""The words of federated learning; where a method has a name of its own, it stands for them."""
REPEATS = ("group", "seed")
"""The words over which means are taken."""
_STAGES = ("one-shot", "fine-tuned")
SYNTHETIC = " (synthetic data)"
"""How the name of a dataset ends whose rows are not its own."""
REFERENCES = ("individual", "best parent", "ensemble")
"""What fused networks are compared with; it does not compete."""

_METHODS = {
    "individual": "Individual",
    "best parent": "Best parent",
    "ensemble": "Ensemble",
    "naive": "Naive average",
    "gamf": "GAMF",
    "optimal_transport": "OTFusion",
    "weight_matching": "Weight matching",
    "activation_matching": "Activation matching",
    "merge_many": "MergeMany",
    "frank_wolfe": "Frank-Wolfe (C2M3)",
    "straight_through": "Straight-through",
    "sinkhorn_rebasin": "Sinkhorn Re-Basin",
    "matched_averaging": "PFNM",
    "identity": "Identity",
    "fedavg": "FedAvg",
    "fedprox": "FedProx",
    "fedma": "FedMA",
    "moon": "MOON",
    "fold": "Folded",
}
_DATASETS = {
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "tiny-imagenet": "Tiny-ImageNet",
    "digits": "Digits",
}
_PARTITIONS = {"iid": "i.i.d.", "homogeneous": "homogeneous", "heterogeneous": "heterogeneous"}


@final
@dataclass(frozen=True)
class Summary:
    """All repeats of one thing.

    Args:
        published: quoted from a paper, not measured.
        cell: the words of the records, without those that count repeats.
        values: the means by name.
        repeats: how many records there are.
        failed: why repeats failed, one reason each.
        source: of published numbers.
    """

    published: bool
    cell: Mapping[str, Scalar]
    values: Mapping[str, Value]
    repeats: int
    failed: tuple[str, ...] = ()
    source: str = ""
    records: tuple[Record, ...] = field(default=(), repr=False)

    def part(self, words: Iterable[str]) -> Key:
        """Return the cell's entries for some words, those it has."""
        return tuple((word, self.cell[word]) for word in words if word in self.cell)

    def without(self, words: Iterable[str]) -> Key:
        """Return the cell's other entries."""
        left = set(words)
        return tuple((word, entry) for word, entry in self.cell.items() if word not in left)

    @property
    def setting(self) -> Key:
        """Which networks."""
        return self.part(SETTING)

    @property
    def condition(self) -> Key:
        """What was to be done."""
        return self.part(CONDITION)

    @property
    def row(self) -> Key:
        """Everything else: how it was done."""
        return self.without((*SETTING, *CONDITION))

    @property
    def method(self) -> str:
        """The method, a reference among them."""
        return method_of(self.cell)

    @property
    def reference(self) -> bool:
        """Whether it only serves for comparison."""
        return self.method in REFERENCES


Cell = Mapping[str, Scalar]


def normal(cell: Cell) -> dict[str, Scalar]:
    """Return a cell without what goes without saying, and without what counts repeats; in one order of words.

    The options of a method, as in ``gamf sigma=4.0``, become words of their own.

    >>> normal({"seed": 1, "repair": "none", "stage": "one-shot", "method": "gamf", "size": 1.0})
    {'method': 'gamf', 'stage': 'one-shot'}
    """
    cell = {**cell, **_options(cell.get("method"))}
    known = (*SETTING, "networks", "network", "method", "repair", "size", "stage")
    found = {word: entry for word, entry in cell.items() if entry not in (None, "") and word not in REPEATS}
    if "method" in found:
        found = {word: entry for word, entry in found.items() if word not in FEDERATED}
    if found.get("repair") == "none":
        del found["repair"]
    if found.get("size") == 1:
        del found["size"]
    words = [*(word for word in known if word in found), *(word for word in found if word not in known)]
    return {word: found[word] for word in words}


def _options(method: Scalar) -> dict[str, Scalar]:
    """Take the options out of a method's name.

    >>> _options("gamf sigma=4.0 affinity='edge'")
    {'method': 'gamf', 'sigma': 4.0, 'affinity': 'edge'}
    """
    name, _, rest = str(method or "").partition(" ")
    found = re.findall(r"(\w+)=(.+?)(?=\s+\w+=|$)", rest)
    return {"method": name, **{word: _value(text) for word, text in found}} if found else {}


def _value(text: str) -> Scalar:
    try:
        return float(text)
    except ValueError:
        return text.strip("'\"")


def summarise(records: Iterable[Record]) -> list[Summary]:
    """Join the repeats of results and of published numbers, in the order of tables.

    Published and measured numbers never come together, nor do numbers of two sources.
    """
    records = list(records)
    # Where stages are told apart, one-shot goes without saying; elsewhere there are none.
    stage = {"stage": "one-shot"} if any(record.cell.get("stage") in _STAGES for record in records) else {}
    groups: dict[tuple[bool, str, Key], list[Record]] = {}
    for record in records:
        published = record.kind == "published"
        key = (published, record.source if published else "", tuple(normal({**stage, **record.cell}).items()))
        groups.setdefault(key, []).append(record)
    found = [_summary(published, source, dict(key), group) for (published, source, key), group in groups.items()]
    settings = list(dict.fromkeys(summary.setting for summary in found))
    return sorted(found, key=lambda s: (settings.index(s.setting), condition_order(s.condition), method_order(s)))


def _summary(published: bool, source: str, cell: Cell, group: Sequence[Record]) -> Summary:
    failed = tuple(str(record.extra["error"]) for record in group if record.extra.get("error"))
    worked = [record for record in group if not record.extra.get("error")]
    names = by_order(name for record in worked for name in record.values)
    values = {name: value_of(_number(record, name) for record in worked) for name in names}
    return Summary(
        published,
        cell,
        {name: value for name, value in values.items() if value is not None},
        len(group),
        failed,
        source,
        tuple(group),
    )


def _number(record: Record, name: str) -> float | None:
    value = record.values.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def method_order(summary: Summary) -> int:
    """Put parents, their ensemble and the naive average first, methods in the order of the table of names."""
    names = list(_METHODS)
    return names.index(summary.method) if summary.method in names else len(names)


def condition_order(condition: Key) -> tuple[bool, float, float, str]:
    """Put one-shot before what was trained on, few networks before many."""
    words = dict(condition)
    stage = str(words.get("stage", ""))
    number = re.search(r"\d+", stage)  # as in: round 20
    after = float(number.group()) if number else 0.0
    return stage != "one-shot", _as_number(words.get("networks")), _as_number(words.get("size")) + after, stage


def _as_number(value: Scalar) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def method_of(cell: Cell) -> str:
    """Return a cell's method as a word."""
    return str(cell.get("method", ""))


def groups_of(entries: Iterable[_T], key: Callable[[_T], Key]) -> dict[Key, list[_T]]:
    """Group entries by a key, in the order in which the keys come."""
    found: dict[Key, list[_T]] = {}
    for entry in entries:
        found.setdefault(key(entry), []).append(entry)
    return found


# -- words -----------------------------------------------------------------------------------------


def label(row: Key) -> str:
    """Name a row for people.

    >>> label((("method", "gamf"), ("repair", "refit"), ("sigma", 4)))
    'GAMF + refit, sigma 4'
    """
    words = dict(row)
    network, method, repair = words.pop("network", None), words.pop("method", None), words.pop("repair", None)
    name = str(network) if network is not None else method_text(str(method or ""))
    name += f" + {repair}" if repair else ""
    rest = [f"{word.replace('_', ' ')} {_scalar(entry)}" for word, entry in words.items()]
    return ", ".join(filter(None, [name, *rest]))


def method_text(method: str) -> str:
    """Name a method for people; one like ``gamf-joint`` by the method that it varies, an unknown one by itself.

    >>> method_text("gamf-joint"), method_text("gamf + moon"), method_text("mine")
    ('GAMF, joint', 'GAMF + MOON', 'mine')
    """
    if " + " in method:
        return " + ".join(map(method_text, method.split(" + ")))
    base, dash, variant = method.partition("-")
    if method in _METHODS or base not in _METHODS or not dash:
        return _METHODS.get(method, method)
    return f"{_METHODS[base]}, {variant}"


def setting_text(setting: Key) -> str:
    """Name a setting for people.

    >>> setting_text((("dataset", "cifar10"), ("partition", "iid"), ("architecture", "vgg11")))
    'CIFAR-10, vgg11, i.i.d.'
    """
    words = dict(setting)
    dataset, partition = str(words.get("dataset", "")), str(words.get("partition", ""))
    base, synthetic, _ = dataset.partition(SYNTHETIC)
    parts = [
        _DATASETS.get(base, base) + synthetic,
        str(words.get("architecture", "")),
        _PARTITIONS.get(partition, partition),
    ]
    return ", ".join(part for part in parts if part)


def condition_text(condition: Key, *, stage: bool = True) -> str:
    """Name a condition for people.

    >>> condition_text((("networks", 2), ("stage", "one-shot")))
    '2 networks, one-shot'
    """
    words = dict(condition)
    parts = [f"{words['networks']} networks"] if "networks" in words else []
    if "size" in words:
        parts.append(f"size {_scalar(words['size'])}")
    if stage and "stage" in words:
        parts.append(str(words["stage"]))
    return ", ".join(parts)


def _scalar(value: Scalar) -> str:
    return format(value, "g") if isinstance(value, float) else str(value)
