"""The page of the federated study: its records as tables with paired differences, and what they say."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from weldnet.records import Records

__all__ = ["page"]

LAYERS = 3
"""Exchanges in a layer round of the MLP: one before its first hidden layer is matched, and one after each."""


def page(records: Records) -> str:
    """Return the page: tables with paired differences; what they mean stands in the texts around them."""
    return "\n".join(_lines(records)) + "\n"


def _lines(records: Records) -> Iterator[str]:
    runs = records.of("run")
    commits = sorted({str(r.where.get("commit")) for r in runs})
    yield "# Federated learning: measured"
    yield ""
    yield "Written by `studies/federated_study.py` from `federated.jsonl`; commits " + ", ".join(commits) + "."
    yield "Accuracy in percent on test rows, mean over seeds (standard deviation); differences are paired by seed, with"
    yield "their standard error. `moved` is the mean share of units that matching renumbered, in percent. These are"
    yield "small runs for a CPU, not the papers' protocol: compare rules within a table, not with published numbers."
    yield ""
    settings = [r.extra["config"] for r in runs if r.cell["dataset"] == "mnist"]
    if settings:
        c = settings[0]
        yield f"## MNIST, {c['clients']} clients, Dirichlet({c['partition']['alpha']})"
        yield ""
        yield (
            f"MLP {'-'.join(map(str, c['model_options']['sizes']))}, {c['train_limit']} training and {c['test_limit']} "
            f"test rows, {c['local']['epochs']} local epochs of SGD (lr {c['local']['lr']}, batch "
            f"{c['local']['batch_size']}), all clients in every round."
        )
        for initialisation in ("own", "common"):
            numbers = (1, 4, 20)
            yield ""
            yield f"### {initialisation.capitalize()} initialisation"
            yield ""
            yield from _rounds_table(records, numbers, initialisation=initialisation)
        yield from _by_exchanges(records)
        yield from _apart(records)
    cifar = [r.extra["config"] for r in runs if r.cell["dataset"] == "cifar10"]
    if any(c["rounds"] > 1 for c in cifar):
        c = next(c for c in cifar if c["rounds"] > 1)
        yield ""
        yield f"## CIFAR-10, {c['clients']} clients, Dirichlet({c['partition']['alpha']})"
        yield ""
        yield (
            f"`{c['model']}`, {c['train_limit']} training and {c['test_limit']} test rows, {c['local']['epochs']} "
            f"local epoch of Adam (lr {c['local']['lr']}, batch {c['local']['batch_size']}), all clients in every "
            "round."
        )
        for initialisation in ("own", "common"):
            yield from ("", f"### {initialisation.capitalize()} initialisation", "")
            where = {"dataset": "cifar10", "architecture": "simple_cnn", "initialisation": initialisation}
            yield from _rounds_table(records, (1, 4, 20), **where)
    if any(c["rounds"] == 1 for c in cifar):
        c = next(c for c in cifar if c["rounds"] == 1)
        yield ""
        yield f"## CIFAR-10, {c['clients']} clients, one shot, own initialisations"
        yield ""
        yield (
            f"`{c['model']}`, {c['train_limit']} training rows in equal parts; `refit` uses {c['server_rows']} "
            "unlabelled rows on the server."
        )
        yield ""
        yield from _one_shot(records)
    yield ""
    yield FINDINGS


def _accuracies(records: Records, number: int, **cell: Any) -> dict[int, float]:
    found = records.of("round", round=number, **cell)
    return {int(r.cell["seed"]): 100 * r.values["accuracy"] for r in found if r.values.get("accuracy") is not None}


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ({statistics.stdev(values):.1f})" if len(values) > 1 else f"{values[0]:.1f}"


def _paired(a: Mapping[int, float], b: Mapping[int, float]) -> str:
    both = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    if not both:
        return ""
    error = f" ± {statistics.stdev(both) / len(both) ** 0.5:.1f}" if len(both) > 1 else ""
    return f"{statistics.mean(both):+.1f}{error}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]


def _rounds_table(records: Records, numbers: Sequence[int], **changes: Any) -> list[str]:
    base: dict[str, Any] = {"dataset": "mnist", "server_optimiser": "none", "repair": "none", "architecture": "mlp"}
    base |= {"partition": "dirichlet 0.5", "clients": 5, "participation": 1.0, **changes}
    plain = {n: _accuracies(records, n, rule="fedavg", algorithm="plain", **base) for n in numbers}
    rows: list[list[str]] = []
    known = [r.cell for r in records.of("round", round=numbers[0], **base)]
    for rule, algorithm in dict.fromkeys((str(c["rule"]), str(c["algorithm"])) for c in known):
        seeds = len(_accuracies(records, numbers[0], rule=rule, algorithm=algorithm, **base))
        row = [rule if algorithm == "plain" else f"{rule} + {algorithm}", str(seeds)]
        for n in numbers:
            found = _accuracies(records, n, rule=rule, algorithm=algorithm, **base)
            row += [_spread(list(found.values())), _paired(found, plain[n])] if found else ["", ""]
        for n in (1, numbers[-1]):
            moved = [
                100 * r.values["moved"]
                for r in records.of("round", round=n, rule=rule, algorithm=algorithm, **base)
                if r.values.get("moved") is not None
            ]
            row.append(f"{statistics.mean(moved):.1f}" if moved else "")
        rows.append(row)
    head = ["rule", "seeds"]
    for n in numbers:
        head += [f"round {n}", "minus fedavg"]
    return _table([*head, "moved, 1", f"moved, {numbers[-1]}"], rows)


def _by_exchanges(records: Records) -> Iterator[str]:
    """Yield layer rounds beside FedAvg after as many exchanges: a round of theirs sends and trains more."""
    base = {"dataset": "mnist", "partition": "dirichlet 0.5", "initialisation": "own", "clients": 5}
    rows: list[list[str]] = []
    for rule in ("fedma-layers", "fedma-layers-growth"):
        for number in (1, 4):
            exchanges = LAYERS * number
            found = _accuracies(records, number, rule=rule, **base)
            plain = _accuracies(records, exchanges, rule="fedavg", **base)
            if found and plain:
                sent = [_sent(records, name, n, base) for name, n in ((rule, number), ("fedavg", exchanges))]
                accuracies = [_spread(list(values.values())) for values in (found, plain)]
                words = [rule, str(number), str(exchanges), *accuracies, _paired(found, plain)]
                rows.append([*words, f"{sent[0] / sent[1]:.2f}"])
    if rows:
        head = ("rule", "round", "exchanges", "accuracy", "fedavg after as many", "difference", "bytes, of fedavg's")
        yield from ("", "### Layer rounds, by exchanges", "", *_table(head, rows))


def _sent(records: Records, rule: str, last: int, cell: Mapping[str, Any]) -> float:
    found = [r for r in records.of("round", rule=rule, **cell) if int(r.cell["round"]) <= last]
    return sum(r.values["bytes_up"] + r.values["bytes_down"] for r in found)


def _apart(records: Records) -> Iterator[str]:
    """Yield the tables of clients that differ in more than their initialisation."""
    tables = (
        ("Own initialisation, two shards of the sorted labels each", {"partition": "shards 2"}),
        ("Own initialisation, 10 clients, half of them in a round", {"clients": 10, "participation": 0.5}),
        ("Own initialisation, widths 48-24, 32-16 and 72-36 by turns", {"architecture": "mlp of several widths"}),
    )
    for title, changes in tables:
        yield from ("", f"### {title}", "")
        yield from _rounds_table(records, (1, 4), initialisation="own", **changes)


FINDINGS = """## What it says

- One shot, own initialisations: matching is worth 20 to 30 points and more, on the MLP and on the convolutional
  network. After longer local training the difference is larger.
- A repair on unlabelled rows of the server lifts FedAvg nearly as high, and the others further: after `refit` matching
  is worth 1 to 2 points (standard error 0.4 for `gamf` and `weight_matching`).
- FedMA's layer rounds are 53 to 61 points above FedAvg after one round. But such a round has three exchanges here, with
  two epochs of training in each. FedAvg after as many exchanges is level with them; only growth is 6 points above it in
  its first round (two standard errors), for 1.4 times the bytes.
- After four rounds nothing of it is left. Once the first round is over, every client begins from the broadcast
  model, no unit moves any more, and a matched average is FedAvg's.
- On CIFAR-10 with five clients of one local epoch the first round is worth little to anybody, and the same holds.
- Common initialisation: no unit moves in any round, and every alignment method gives FedAvg's numbers. Who wants
  more there must look elsewhere: at weights (uniform or by samples), at class counts (`fedma`), at the clients'
  loss.
- MOON gained nothing in these few rounds of a small MLP; with it, too, `gamf` is FedAvg's equal.
- Few labels (two shards each) do not favour matching: 11 points in the first round, with large errors; after four
  rounds `weight_matching` is level, and `gamf` and `fedma` are below FedAvg.
- With half of ten clients in a round, rules that match are 9 to 15 points above at first, and 2 to 6 after four rounds.
- Clients of other widths (`optimal_transport` takes them) begin and go on as those of equal widths do.
- 12 local epochs on CIFAR-10 were chosen after 6 had given less than 20 points; both are shown.

Not measured here: the published tables at their size (`weldnet reproduce federated-talk --scale gpu`), and all of MNIST
(`weldnet reproduce federated-matching --scale gpu`)."""


def _one_shot(records: Records) -> list[str]:
    rows: list[list[str]] = []
    words = ("local_epochs", "repair", "rule")
    known = [tuple(r.cell[word] for word in words) for r in records.of("round", dataset="cifar10", clients=2)]
    for epochs, repair, rule in sorted(dict.fromkeys(known), key=lambda key: (-int(str(key[0])), str(key[1]))):
        base = {"dataset": "cifar10", "clients": 2, "repair": repair, "local_epochs": epochs}
        plain, found = (_accuracies(records, 1, rule=name, **base) for name in ("fedavg", rule))
        row = [str(rule), str(repair), str(epochs), str(len(found))]
        rows.append([*row, _spread(list(found.values())), _paired(found, plain)])
    return _table(["rule", "repair", "local epochs", "seeds", "accuracy", "minus fedavg"], rows)
