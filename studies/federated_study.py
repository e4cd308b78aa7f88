"""Study: when does matching pay in federated learning? Rules, initialisations, rounds, seeds; records and a page.

    python studies/federated_study.py run --part mnist --out docs/results/federated.jsonl --work /tmp/federated
    python studies/federated_study.py page --out docs/results/federated.jsonl --page docs/results/federated.md

Every run is an ordinary federated run, whose folder lies in ``--work``; what is done is not done again.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from federated_page import page

from weldnet.federated import FederatedConfig, Federation, Order, Worked, simulate
from weldnet.records import Record, append, read

RULES = ["fedavg", "fedavg-uniform", "optimal_transport", "weight_matching", "gamf", "fedma"]

MNIST: dict[str, Any] = {
    "dataset": "mnist",
    "train_limit": 3000,
    "test_limit": 2000,
    "model": "mlp",
    "model_options": {"sizes": [784, 48, 24, 10]},
    "clients": 5,
    "partition": {"scheme": "dirichlet", "alpha": 0.5},
    "local": {"epochs": 2, "batch_size": 32, "lr": 0.05},
}
CIFAR: dict[str, Any] = {
    "dataset": "cifar10",
    "train_limit": 8000,
    "test_limit": 2000,
    "server_rows": 512,
    "model": "simple_cnn",
    "model_options": {"in_channels": 3, "image_size": 32},
    "clients": 2,
    "partition": {"scheme": "iid"},
    "initialisation": "own",
    "rounds": 1,
    "local": {"epochs": 12, "batch_size": 64, "lr": 0.002, "optimizer": "adam", "schedule": "onecycle"},
}

CIFAR_ROUNDS: dict[str, Any] = {
    **{key: CIFAR[key] for key in ("dataset", "model", "model_options")},
    "train_limit": 4000,
    "test_limit": 1000,
    "clients": 5,
    "partition": {"scheme": "dirichlet", "alpha": 0.5},
    "rounds": 20,
    "local": {"epochs": 1, "batch_size": 32, "lr": 0.002, "optimizer": "adam"},
}

APART: tuple[dict[str, Any], ...] = (
    {"partition": {"scheme": "shards", "shards": 2}},
    {"clients": 10, "participation": 0.5},
)
"""Where clients have few labels each, and where half of them are asked in a round."""


def settings(part: str) -> Iterator[dict[str, Any]]:
    """Yield the runs of a part, without their seeds."""
    if part == "mnist":
        for initialisation in ("own", "common"):
            for rule in RULES:
                yield {**MNIST, "initialisation": initialisation, "rule": rule, "rounds": 20}
        for rule in ("fedavg", "gamf"):
            yield {**MNIST, "rule": rule, "rounds": 20, "algorithm": {"name": "moon", "mu": 1.0}}
    elif part == "cifar":
        for repair in ("none", "refit"):
            for rule in ("fedavg", "optimal_transport", "weight_matching", "gamf"):
                yield {**CIFAR, "rule": rule, "repair": repair}
    elif part == "cifar-rounds":
        for initialisation in ("own", "common"):
            for rule in ("fedavg", "weight_matching", "gamf"):
                yield {**CIFAR_ROUNDS, "initialisation": initialisation, "rule": rule}
    elif part == "layers":
        for rule in ("fedma-layers", {"name": "fedma", "layers": True, "growth": True, "sigma": 0.3, "gamma": 1.0}):
            yield {**MNIST, "initialisation": "own", "rule": rule, "rounds": 4}
    elif part == "apart":
        for change in APART:
            for rule in ("fedavg", "weight_matching", "gamf", "fedma"):
                yield {**MNIST, "initialisation": "own", "rule": rule, "rounds": 4, **change}
        widths = [{}, {"sizes": [784, 32, 16, 10]}, {"sizes": [784, 72, 36, 10]}]
        yield {**MNIST, "initialisation": "own", "rule": "optimal_transport", "rounds": 4, "own_model_options": widths}
    else:
        raise SystemExit(f"unknown part {part!r}; give mnist, cifar, cifar-rounds, layers or apart")


class Shared(Federation):
    """A federation whose clients train once for all runs that ask the same of them: the first round."""

    known: dict[tuple[Any, ...], Worked] = {}  # noqa: RUF012  one table for all

    def work(self, order: Order, client_state: Mapping[str, torch.Tensor] | None = None) -> Worked:
        """Do what a client was asked, or give what it gave before."""
        config = self.config
        if order.round > 1 or order.phase or config.make_algorithm().name != "plain":
            return super().work(order, client_state)
        same = config.model_dump(exclude={"rule", "repair", "rounds", "server_optimiser", "algorithm"})
        key = (str(sorted(same.items())), order.client)
        if key not in self.known:
            self.known[key] = super().work(order, client_state)
        return self.known[key]


def run(part: str, seeds: Sequence[int], out: Path, work: Path) -> None:
    """Do the runs of a part that are not done, seed by seed; put their records into one file."""
    done = {(r.kind, r.key) for r in read(out)} if out.exists() else set()
    for seed in seeds:
        Shared.known.clear()
        for setting in settings(part):
            config = FederatedConfig.make({**setting, "seed": seed})
            if ("round", f"{config.key()}-{config.rounds}") in done:
                continue
            folder = work / config.key()
            shutil.rmtree(folder, ignore_errors=True)
            simulate(config, folder, federation=Shared(config))
            found = [_lean(record) for record in read(folder) if record.kind in ("run", "round")]
            _append(out, found)
            last = found[-1]
            print(last.cell["rule"], last.cell["initialisation"], seed, last.values["accuracy"], flush=True)


def _lean(record: Record) -> Record:
    """Leave out of a round's record what the run's record says, and the clients one by one."""
    return record if record.kind == "run" else replace(record, extra={}, where={"commit": record.where["commit"]})


def _append(out: Path, records: Iterable[Record]) -> None:
    scratch = out.parent / f".{out.name}.d"
    append(scratch, records)
    with out.open("a", encoding="utf-8") as file:
        file.write((scratch / "records.jsonl").read_text(encoding="utf-8"))
    shutil.rmtree(scratch)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["run", "page"])
    parser.add_argument("--part", default="mnist")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("docs/results/federated.jsonl"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/federated"))
    parser.add_argument("--page", type=Path, default=Path("docs/results/federated.md"))
    options = parser.parse_args()
    if options.what == "page":
        options.page.write_text(page(read(options.out)), encoding="utf-8")
    else:
        torch.set_num_threads(1)
        run(options.part, [int(seed) for seed in options.seeds.split(",")], options.out, options.work)


if __name__ == "__main__":
    main()
