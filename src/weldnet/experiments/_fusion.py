"""Fusion studies: networks are trained, and each group of them is fused by every method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

from weldnet.alignment import describe
from weldnet.data import Identity
from weldnet.errors import ConfigError, WeldnetError
from weldnet.experiments._cells import Cell, Context, Made, hashed
from weldnet.experiments._config import Study
from weldnet.experiments._cost import Cost, forward_cost
from weldnet.experiments._data import marked, split_size
from weldnet.experiments._group import run_group
from weldnet.experiments._methods import NAIVE, parse_method
from weldnet.experiments._networks import NetworkSpec, obtain
from weldnet.experiments._protocol import REFERENCES, Architecture, Partition, Protocol
from weldnet.experiments._tasks import GroupTask, NetworkTask
from weldnet.fusion import REPAIRS
from weldnet.records import Record
from weldnet.training import Recipe

__all__ = ["Protocol", "cells", "run"]

_FORMAT = 1


def cells(study: Study, data: Mapping[tuple[str, str], Identity]) -> list[Cell]:
    """Return the cells: one for every network, then one for every group and method.

    Args:
        study: the table at its scale.
        data: what the dataset is; keys are only final where that is known.

    Raises:
        ConfigError: a cell cannot be built; the message names it and says why.
    """
    protocol: Protocol = study.protocol
    _check_names(study, protocol)
    networks: dict[str, Cell] = {}
    groups: list[Cell] = []
    for setting in _settings(study, protocol, data):
        for cell in setting.network_cells():
            networks.setdefault(cell.makes[0].key, cell)
        groups += setting.group_cells()
    return [*networks.values(), *groups]


def run(cell: Cell, context: Context) -> list[Record]:
    """Train a network, or fuse a group by one method."""
    if isinstance(cell.work, GroupTask):
        return run_group(cell, context)
    task: NetworkTask = cell.work
    spec = task.spec
    if spec.scheme is not None:
        spec.training_rows(context.folder / "partitions")  # writes the index file
    trained = obtain(spec, context.cache, say=context.say, tick=context.tick)
    parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    last = trained.history[-1]["accuracy"] if trained.history else None
    values = {**trained.scores, "training_accuracy": last, "rows": trained.rows, "parameters": parameters}
    return [
        Record(
            kind="network",
            key=spec.key,
            cell=cell.makes[0].words,
            values={**values, "seconds": trained.seconds},
            extra={"spec": spec.facts, "history": list(trained.history)},
            seed=spec.seed,
            where=dict(trained.where),
        )
    ]


@final
@dataclass(frozen=True)
class _Setting:
    """One architecture on one partition with one number of networks."""

    study: Study
    data: Mapping[tuple[str, str], Identity]
    label: str
    architecture: Architecture
    split: str
    partition: Partition
    networks: int
    groups: int

    @property
    def protocol(self) -> Protocol:
        return self.study.protocol

    @property
    def name(self) -> str:
        return f"{self.protocol.dataset}/{self.split}/{self.label}/N={self.networks}"

    @property
    def words(self) -> dict[str, Any]:
        return {
            "dataset": marked(self.protocol.dataset, self.data),
            "partition": self.split,
            "architecture": self.label,
        }

    def spec(self, group: int, member: int) -> NetworkSpec:
        protocol, kind = self.protocol, self.architecture
        options = kind.others if member and kind.others is not None else kind.options
        found = self.data.get((protocol.dataset, "train"))
        spread = self.partition.scheme is not None
        return NetworkSpec(
            model=kind.model,
            options=options,
            dataset=protocol.dataset,
            data="" if found is None else found.sha256,
            rows=protocol.rows,
            recipe=Recipe(**{**protocol.recipe, **kind.recipe, **self.partition.recipe}),
            seed=protocol.first_seed + group * self.networks + member,
            scheme=self.partition.scheme,
            parts=self.networks if spread else 1,
            scheme_options=self.partition.options,
            threads=protocol.threads,
            device=protocol.device,
        )

    def specs(self, group: int) -> tuple[NetworkSpec, ...]:
        return tuple(self.spec(group, member) for member in range(self.networks))

    def cost(self, options: Mapping[str, Any]) -> Cost:
        rows, shape, classes = split_size(self.protocol.dataset, self.data)
        rows = min(rows, self.protocol.rows or rows)
        return forward_cost(self.architecture.model, options, shape, classes, rows)

    def network_cells(self) -> Iterator[Cell]:
        for group in range(self.groups):
            for member in range(self.networks):
                try:
                    spec = self.spec(group, member)
                    cost = self.cost(spec.options)
                except (WeldnetError, TypeError, ValueError) as error:
                    raise self.fault(error) from error
                words: dict[str, Any] = {**self.words, "seed": spec.seed}
                if spec.scheme is not None:
                    words["networks"] = self.networks
                yield Cell(
                    name=f"{self.protocol.dataset}/{self.split}/{self.label}/{_of(self)}seed{spec.seed}",
                    makes=(Made(spec.key, words, "network"),),
                    work=NetworkTask(spec),
                    cost=cost.training(spec.recipe.epochs) / spec.parts,
                    memory=cost.memory,
                )

    def group_cells(self) -> Iterator[Cell]:
        asked = [name for name in self.protocol.methods if name in REFERENCES]
        for group in range(self.groups):
            if asked:
                yield self._references(group, asked)
            for method in self.protocol.methods:
                if method not in REFERENCES:
                    yield self._fusion(group, method)

    def _references(self, group: int, asked: list[str]) -> Cell:
        specs = self.specs(group)
        facts = {"networks": [spec.key for spec in specs], "test_rows": self.protocol.test_rows}
        makes = [
            Made(hashed(format=_FORMAT, method=name, **facts), {**self._group_words(group), "method": name})
            for name in asked
        ]
        return self._group_cell(group, "references", makes, GroupTask(specs, None, self.protocol), 1)

    def _fusion(self, group: int, method: str) -> Cell:
        protocol, specs = self.protocol, self.specs(group)
        label = NAIVE if method == NAIVE else method if method == "fold" else describe(parse_method(method))
        task = GroupTask(specs, method, protocol)
        tuning = protocol.fine_tuning
        facts = {
            "networks": [spec.key for spec in specs],
            "method": method if method in (NAIVE, "fold") else repr(parse_method(method)),
            "samples": protocol.samples,
            "test_rows": protocol.test_rows,
        }
        makes = self._beside(group, method, label, facts)
        tuned = 0
        for size in protocol.sizes:
            for repair in protocol.repairs:
                words = {**self._group_words(group), "method": label, "repair": repair, "size": size}
                line = protocol.barrier.model_dump() if size == 1 else None
                more = {**facts, "repair": repair, "size": size}
                makes.append(
                    Made(hashed(format=_FORMAT, stage="one-shot", line=line, **more), {**words, "stage": "one-shot"})
                )
                if tuning is not None and method in tuning.methods and repair in tuning.repairs:
                    tuned += 1
                    recipe = asdict(Recipe(**tuning.recipe))
                    key = hashed(format=_FORMAT, stage="fine-tuned", recipe=recipe, **more)
                    makes.append(Made(key, {**words, "stage": "fine-tuned"}))
        epochs = tuned * Recipe(**tuning.recipe).epochs if tuning is not None else 0
        return self._group_cell(group, label, makes, task, len(makes) - tuned + 2, epochs)

    def _beside(self, group: int, method: str, label: str, facts: Mapping[str, Any]) -> list[Made]:
        """Return the records beside the results: the line between the networks, and who went where."""
        line = self.protocol.barrier
        words = {k: v for k, v in self._group_words(group).items() if k not in ("stage", "size")} | {"method": label}
        asked: dict[Any, bool] = {
            "curve": line.points > 0 and method != "fold",
            "couplings": method in self.protocol.couplings and group == 0,
        }
        about = {"curve": line.model_dump(), "couplings": None}
        return [
            Made(hashed(format=_FORMAT, kind=kind, about=about[kind], **facts), words, kind)
            for kind, yes in asked.items()
            if yes
        ]

    def _group_cell(
        self, group: int, label: str, makes: list[Made], task: GroupTask, passes: int, epochs: int = 0
    ) -> Cell:
        cost = self.cost(self.architecture.options)
        points = self.protocol.barrier.points * (self.networks - 1)
        scale = (self.protocol.barrier.rows or 10_000) / 10_000
        seconds = cost.pass_over(10_000) * (passes + points * scale) + cost.training(epochs)
        return Cell(
            name=f"{self.name}/group{group}/{label}",
            makes=tuple(makes),
            work=task,
            needs=tuple(spec.key for spec in task.specs),
            cost=seconds + 2.0 * self.networks,
            memory=cost.memory + self.networks * 8 * cost.parameters,
        )

    def _group_words(self, group: int) -> dict[str, Any]:
        return {**self.words, "networks": self.networks, "group": group, "stage": "one-shot", "size": 1.0}

    def fault(self, error: Exception) -> ConfigError:
        return ConfigError(f"{self.study.file}: cell {self.name}: {' '.join(str(error).split())}")


def _settings(study: Study, protocol: Protocol, data: Mapping[tuple[str, str], Identity]) -> Iterator[_Setting]:
    for split, partition in protocol.partitions.items():
        for label, architecture in protocol.architectures.items():
            for networks, groups in (partition.networks or protocol.networks).items():
                yield _Setting(study, data, label, architecture, split, partition, networks, groups)


def _check_names(study: Study, protocol: Protocol) -> None:
    """Refuse methods, repairs and recipes that do not exist, before anything is computed."""
    tuning = protocol.fine_tuning
    try:
        for method in (*protocol.methods, *(tuning.methods if tuning else ()), *protocol.couplings):
            if method not in (*REFERENCES, NAIVE, "fold"):
                chosen = parse_method(method)
                if chosen.needs_data and not protocol.samples:
                    raise ConfigError(f"method {method!r} needs unlabelled inputs; set samples to 1 or more")
        for repair in (*protocol.repairs, *(tuning.repairs if tuning else ())):
            for name in repair.split("+"):
                if name not in REPAIRS:
                    raise ConfigError(f"unknown repair {name!r}; weldnet has {', '.join(REPAIRS)}")
                if name in ("data", "refit", "calibrate") and not protocol.samples:
                    raise ConfigError(f"repair {repair!r} needs unlabelled inputs; set samples to 1 or more")
        if tuning is not None:
            Recipe(**tuning.recipe)
    except (WeldnetError, TypeError) as error:
        raise ConfigError(f"{study.file}: {' '.join(str(error).split())}") from error


def _of(setting: _Setting) -> str:
    return f"N={setting.networks}/" if setting.partition.scheme is not None else ""
