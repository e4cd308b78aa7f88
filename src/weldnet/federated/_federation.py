"""A federated run without its engine: what the clients do and what the server does, round by round.

Engines only carry messages. They take :meth:`Server.orders`, let :meth:`Federation.work` do each of them where the
client is, and bring the updates to :meth:`Server.receive`, until the server is done.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn

from weldnet._arrays import find_device
from weldnet.data import Split, load, partition
from weldnet.errors import ConfigError
from weldnet.federated._algorithm import Task, train_locally
from weldnet.federated._blueprint import Blueprint
from weldnet.federated._config import FederatedConfig
from weldnet.federated._matched import Matched, align_to_reference
from weldnet.federated._moon import with_head
from weldnet.federated._rule import Setting
from weldnet.federated._update import ClientUpdate, Sound
from weldnet.models import MODELS, build
from weldnet.training import initialise

__all__ = ["Federation", "Order", "Worked", "derive_seed", "fixed_threads"]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """What the server asks one client to do: to train from here.

    Args:
        client: its name.
        round: the number of the round: 1, 2, ...
        phase: of the round; 0 but in FedMA's layer rounds, which match one layer a phase.
        state: the model that is sent.
        frozen: tensors that must not change.
    """

    client: str
    round: int
    state: Mapping[str, Tensor]
    phase: int = 0
    frozen: frozenset[str] = frozenset()


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Worked:
    """What a client's round gave: the update for the server, and what the client keeps for its next round."""

    update: ClientUpdate
    client_state: dict[str, Tensor]


class Federation:
    """All that a config stands for: the data in their parts, the model, its structure. Made once a process.

    The same config gives the same parts, initial weights and rounds, in whatever process and order the clients work.

    Args:
        config: the settings.

    Raises:
        ConfigError: there is no such model, or it cannot be built.
        UsageError: there is no such device here.
    """

    def __init__(self, config: FederatedConfig) -> None:
        self.config = config
        find_device(config.device)
        self._factory = _factory(config, {})
        self._own = [_factory(config, options) for options in config.own_model_options]

    @property
    def clients(self) -> tuple[str, ...]:
        """The clients' names, in order; they sort as they count."""
        digits = max(2, len(str(self.config.clients - 1)))
        return tuple(f"client-{number:0{digits}d}" for number in range(self.config.clients))

    @cached_property
    def train_data(self) -> Split:
        """The training set."""
        return load(self.config.dataset, split="train", limit=self.config.train_limit)

    @cached_property
    def test_data(self) -> Split:
        """The test set."""
        return load(self.config.dataset, split="test", limit=self.config.test_limit)

    @cached_property
    def parts(self) -> dict[str, Tensor]:
        """The row numbers of each client in the training set."""
        labels, held = self.train_data.labels, self._held_back
        rest = torch.ones(len(labels), dtype=torch.bool)
        rest[held] = False
        rows = rest.nonzero().flatten()
        found = partition(
            labels[rows],
            self.config.clients,
            seed=derive_seed(self.config.seed, "partition"),
            **self.config.partition.model_dump(),
        )
        return {client: rows[part] for client, part in zip(self.clients, found, strict=True)}

    def require_parts(self) -> None:
        """Load the training set and split it now: where that cannot be, every client would fail on its own.

        Raises:
            ConfigError: more rows are held back than there are.
            DataError: there is no such dataset, or too few rows for the clients.
        """
        assert self.parts

    @cached_property
    def server_data(self) -> Tensor | None:
        """The unlabelled images that the server has, if any."""
        return self.train_data.images[self._held_back] if self.config.server_rows else None

    @cached_property
    def _held_back(self) -> Tensor:
        count, rows = self.config.server_rows, len(self.train_data)
        if count >= rows:
            raise ConfigError(
                f"server_rows is {count}, but the training set has {rows} rows; leave some to the clients"
            )
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "server rows"))
        return torch.randperm(rows, generator=generator)[:count].sort().values

    @cached_property
    def blueprint(self) -> Blueprint:
        """The model as the server sees it."""
        return Blueprint.of(self._build("server"), self.test_data.images[:2])

    def initial(self) -> dict[str, Tensor]:
        """Return the weights that the server begins with."""
        return _state(self._build("server"))

    def data_of(self, client: str) -> Split:
        """Return a client's samples."""
        return self.train_data.rows(self.parts[client])

    def chosen(self, number: int) -> tuple[str, ...]:
        """Return who is asked in a round (1, 2, ...), sorted."""
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "clients", number))
        order = torch.randperm(self.config.clients, generator=generator)[: self.config.selected]
        return tuple(self.clients[index] for index in sorted(order.tolist()))

    def began(self, order: Order) -> bool:
        """Whether a client begins from the model that it is sent, and not from weights of its own."""
        return self.config.initialisation == "common" or order.round > 1 or order.phase > 0

    def work(self, order: Order, client_state: Mapping[str, Tensor] | None = None) -> Worked:
        """Do what a client was asked: train, and align if that is the client's to do.

        Args:
            order: what the server asks.
            client_state: what the client kept from its last round.

        Raises:
            TrainingError: the loss is not finite.
            DataError: the samples do not fit the model.
        """
        config, data, began = self.config, self.data_of(order.client), self.began(order)
        start = order.state if began else _state(self._build(order.client))
        algorithm = config.make_algorithm()
        task = Task(
            model=self.blueprint.module(start),
            data=data,
            recipe=config.local.recipe(derive_seed(config.seed, order.client, order.round, order.phase)),
            sent=order.state,
            began=began,
            client_state=client_state or {},
            frozen=order.frozen,
            device=config.device,
        )
        with fixed_threads(config.threads):
            result = train_locally(algorithm, task)
            state, kept, values = result.state, result.client_state, result.values
            if config.align_at == "client":
                state, values["moved"] = self._aligned(state, data, order)
                # What was aligned has the order of units of the model that was sent.
                kept = algorithm.remember(state, dataclasses.replace(task, began=True))
        counts = Counter(data.labels.tolist())
        update = ClientUpdate(
            client=order.client, state=state, examples=len(data), classes=dict(sorted(counts.items())), values=values
        )
        return Worked(update=update, client_state=kept)

    def _aligned(self, state: Mapping[str, Tensor], data: Split, order: Order) -> tuple[dict[str, Tensor], float]:
        rule = self.config.make_rule()
        assert isinstance(rule, Matched)
        setting = Setting(
            reference=order.state,
            blueprint=self.blueprint,
            seed=derive_seed(self.config.seed, "align", order.client, order.round),
            device=find_device(self.config.device),
            data=data.images if rule.chosen.needs_data else None,
        )
        update = ClientUpdate(client=order.client, state=state, examples=len(data))
        with torch.no_grad():
            own = self.blueprint.structure_of(state, order.state, any_width=rule.any_width)
            sound = Sound(update, state, own)
            found = align_to_reference(rule.chosen, sound, setting)
        return dict(found.state), found.moved

    def _build(self, who: str) -> nn.Module:
        factory = self._factory
        if self._own and who in self.clients:
            factory = self._own[self.clients.index(who) % len(self._own)]
        return initialise(factory, derive_seed(self.config.seed, "weights", who))


def derive_seed(seed: int, *words: object) -> int:
    """Return a seed below 2^32 that a seed and some words decide."""
    text = "/".join(map(str, (seed, *words)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


@contextmanager
def fixed_threads(count: int) -> Iterator[None]:
    """Let PyTorch compute on a number of threads, on which rounding depends; then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _factory(config: FederatedConfig, changes: Mapping[str, Any]) -> Callable[[], nn.Module]:
    make = _maker(config.model)
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in {**config.model_options, **changes}.items()}

    def build_model() -> nn.Module:
        model = make(**options)
        return with_head(model, config.projection) if config.projection is not None else model

    try:
        with torch.random.fork_rng(devices=[]):
            model = build_model()
    except Exception as error:
        raise ConfigError(f"model {config.model!r} cannot be built with {options}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {config.model!r} gives a {type(model).__name__}; give a factory of an nn.Module")
    return build_model


def _maker(name: str) -> Callable[..., nn.Module]:
    if ":" not in name:
        if name not in MODELS:
            raise ConfigError(
                f"unknown model {name!r}; known are {', '.join(MODELS)}, or give 'package.module:factory'"
            )
        return lambda **options: build(name, **options)
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model {name!r} cannot be imported: {error}; give 'package.module:factory'") from error


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
