"""Federated studies: one run of rounds for every setting, method and seed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, final

from pydantic import BaseModel, ConfigDict, Field, model_validator

from weldnet.data import Identity
from weldnet.errors import ConfigError, FederatedError, WeldnetError
from weldnet.experiments._cells import Cell, Context, Made, hashed
from weldnet.experiments._config import Study
from weldnet.experiments._cost import forward_cost
from weldnet.experiments._data import marked, split_size
from weldnet.federated import FederatedConfig, simulate
from weldnet.records import Record, read

__all__ = ["Protocol", "cells", "run"]

_FORMAT = 1

Count = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Setting(_Strict):
    """Where methods are compared: what it changes in the base, and what a method changes further there."""

    config: dict[str, Any] = {}
    methods: dict[str, dict[str, Any]] = {}


class Protocol(_Strict):
    """The protocol of a federated study; ``base``, settings and methods hold keys of :class:`FederatedConfig`.

    A run's config is the base, with the setting's config, the method's and the setting's own for that method laid over
    it, key by key. ``architecture`` is the word that records have for the model. ``at`` are rounds of which results
    are taken; the last one is in any case.
    """

    base: dict[str, Any]
    settings: Annotated[dict[str, Setting], Field(min_length=1)]
    methods: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    architecture: str | None = None
    at: list[Count] = []
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0]
    device: Literal["cpu", "cuda"] = "cpu"
    threads: Count = 1

    @model_validator(mode="after")
    def _methods_exist(self) -> Protocol:
        for label, setting in self.settings.items():
            for method in setting.methods:
                if method not in self.methods:
                    raise ValueError(f"setting {label!r} changes the method {method!r}, which methods does not have")
        return self

    @property
    def datasets(self) -> tuple[str, ...]:
        """The datasets that it needs."""
        named = [{**self.base, **setting.config}.get("dataset") for setting in self.settings.values()]
        return tuple(dict.fromkeys(str(name) for name in named))

    def config(self, setting: str, method: str, seed: int) -> FederatedConfig:
        """Return the config of one run.

        Raises:
            ConfigError: it means nothing.
        """
        chosen = self.settings[setting]
        laid = {**self.base, **chosen.config, **self.methods[method], **chosen.methods.get(method, {})}
        for key in ("local", "partition", "model_options"):
            parts = (self.base, chosen.config, self.methods[method], chosen.methods.get(method, {}))
            merged = {name: value for part in parts for name, value in part.get(key, {}).items()}
            if merged:
                laid[key] = merged
        return FederatedConfig.make({**laid, "seed": seed, "threads": self.threads, "device": self.device}, "run")


@final
@dataclass(frozen=True)
class Run:
    """One federated run: its config, and the words of its records."""

    config: FederatedConfig
    words: Mapping[str, Any]
    data: str
    at: tuple[int, ...]

    @property
    def key(self) -> str:
        """A hash of what makes it."""
        return hashed(format=_FORMAT, config=self.config.key(), data=self.data, test=self.config.test_limit)

    def made(self, number: int) -> Made:
        """Return the result of one round."""
        words = {**self.words, "stage": f"round {number}", "round": number}
        return Made(hashed(run=self.key, round=number), words)


def cells(study: Study, data: Mapping[tuple[str, str], Identity]) -> list[Cell]:
    """Return a cell for every setting, method and seed.

    Args:
        study: the table at its scale.
        data: what the datasets are; keys are only final where that is known.

    Raises:
        ConfigError: a run cannot be built; the message names it and says why.
    """
    return list(_cells(study, data))


def run(cell: Cell, context: Context) -> list[Record]:
    """Do one run, or what is missing of it; its folder goes when its records are made."""
    work: Run = cell.work
    folder = context.folder / "states" / f"federated-{work.key}"
    total = work.config.rounds
    try:
        server = simulate(
            work.config,
            folder,
            resume=True,
            on_round=lambda record: context.tick(_number(record) / total),
        )
    except FederatedError:
        # What is tried again begins again: rounds that failed are not gone on from.
        shutil.rmtree(folder, ignore_errors=True)
        raise
    rounds = {_number(record): record for record in read(folder).of("round")}
    kept = context.folder / "models" / f"federated-{work.key}.safetensors"
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(server.finish(), kept)
    shutil.rmtree(folder)
    wanted = {made.key: made for made in cell.makes}
    found: list[Record] = []
    for number, record in sorted(rounds.items()):
        made = work.made(number)
        common: dict[str, Any] = {"values": record.values, "seed": record.seed, "where": record.where}
        words = {**record.cell, **made.words}
        found.append(Record(kind="round", key=made.key, cell=words, extra=record.extra, **common))
        if made.key in wanted:
            extra = {"config": work.config.model_dump(mode="json")}
            found.append(Record(kind="result", key=made.key, cell=words, extra=extra, **common))
    return found


def _setting(config: FederatedConfig) -> str:
    """The partition, and what else is not the usual way; tables of results tell settings apart by this word."""
    own = ", own initialisation" if config.initialisation == "own" else ""
    part = f", {config.selected} of {config.clients} clients a round" if config.selected < config.clients else ""
    return config.partition.label + own + part


def _number(record: Record) -> int:
    number = record.cell["round"]
    assert isinstance(number, int)
    return number


def _cells(study: Study, data: Mapping[tuple[str, str], Identity]) -> Iterator[Cell]:
    protocol: Protocol = study.protocol
    for setting in protocol.settings:
        for method in protocol.methods:
            for seed in protocol.seeds:
                name = f"{setting}/{method}/seed{seed}"
                try:
                    config = protocol.config(setting, method, seed)
                    yield _cell(name, protocol, method, config, data)
                except (WeldnetError, TypeError, ValueError) as error:
                    raise ConfigError(f"{study.file}: cell {name}: {' '.join(str(error).split())}") from error


def _cell(
    name: str, protocol: Protocol, method: str, config: FederatedConfig, data: Mapping[tuple[str, str], Identity]
) -> Cell:
    words: dict[str, Any] = {
        "dataset": marked(config.dataset, data),
        "partition": _setting(config),
        "architecture": protocol.architecture or config.model,
        "networks": config.clients,
        "group": config.seed,
        "method": method,
        "repair": config.repair,
        "size": 1.0,
    }
    found = data.get((config.dataset, "train"))
    last = {config.rounds, *(number for number in protocol.at if number <= config.rounds)}
    work = Run(config, words, "" if found is None else found.sha256, tuple(sorted(last)))
    rows, shape, classes = split_size(config.dataset, data)
    rows = min(rows, config.train_limit or rows)
    cost = forward_cost(config.model, config.model_options, shape, classes, rows)
    share = config.selected / config.clients
    seconds = config.rounds * (share * cost.training(config.local.epochs) + cost.pass_over(10_000))
    return Cell(
        name=name,
        makes=tuple(work.made(number) for number in work.at),
        work=work,
        cost=seconds,
        memory=cost.memory + 8 * (config.selected + 2) * cost.parameters,
    )
