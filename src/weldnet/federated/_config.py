"""The settings of a federated run: a YAML file, checked once."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import nn

from weldnet.data import Scheme
from weldnet.errors import ConfigError
from weldnet.federated._algorithm import ClientAlgorithm
from weldnet.federated._algorithms import make_algorithm
from weldnet.federated._matched import FedMA, Matched
from weldnet.federated._rule import Rule
from weldnet.federated._rules import make_rule
from weldnet.federated._server import ServerOptimiser, make_optimiser
from weldnet.fusion import make_repair
from weldnet.training import Recipe

__all__ = ["FederatedConfig", "LocalConfig", "PartitionConfig"]

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)

Count = Annotated[int, Field(ge=1)]
Named = str | dict[str, Any]


class PartitionConfig(BaseModel):
    """How the training set is split among the clients; see :func:`weldnet.data.partition`."""

    model_config = _STRICT

    scheme: Scheme = "dirichlet"
    alpha: Annotated[float, Field(gt=0)] = 0.5
    share: Annotated[float, Field(ge=0, le=1)] = 0.8
    shards: Count = 2
    smallest: Annotated[int, Field(ge=1)] = 10

    @property
    def label(self) -> str:
        """The word for records: the scheme and its number, such as ``dirichlet 0.5``."""
        numbers = {"dirichlet": f" {self.alpha:g}", "skew": f" {self.share:g}", "shards": f" {self.shards}"}
        return self.scheme + numbers.get(self.scheme, "")


class LocalConfig(BaseModel):
    """How a client trains in one round; see :class:`weldnet.training.Recipe`."""

    model_config = _STRICT

    epochs: Annotated[int, Field(ge=0)] = 1
    batch_size: Count = 64
    lr: Annotated[float, Field(gt=0)] = 0.05
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "cosine", "onecycle"] = "constant"
    augment: Literal["none", "crop-flip"] = "none"

    def recipe(self, seed: int) -> Recipe:
        """Return the settings as a recipe with a seed."""
        return Recipe(**self.model_dump(), seed=seed)


class FederatedConfig(BaseModel):
    """Everything that a federated run can be told; the keys of a config file.

    Attributes:
        dataset: a name for :func:`weldnet.data.load`, or a folder.
        train_limit: rows of the training set at most.
        test_limit: rows of the test set at most.
        model: a name from :data:`weldnet.models.MODELS`, or ``package.module:factory``.
        model_options: keyword arguments of the factory.
        own_model_options: with own initialisations, what clients change in ``model_options`` in their first round, by
            turns: networks of other widths, for rules that take them (``optimal_transport``).
        projection: units of MOON's projection head in the place of the last layer, whatever the algorithm; or null.
        clients: how many.
        partition: how the training set is split among them.
        participation: share of the clients that are asked in a round.
        min_replies: sound updates that a round needs; with fewer it is skipped and the model stays.
        rounds: how many.
        local: training in a client.
        algorithm: what clients lower: ``plain``, ``fedprox``, ``moon``. This and the next two are a name, or a mapping
            with ``name`` and options.
        rule: how the server combines, see :func:`make_rule`.
        server_optimiser: ``none``, ``fedavgm``, ``fedadam``, ``fedexp``.
        initialisation: ``common``, or ``own``: in the first round every client begins from weights of its own.
        align_at: ``server``, or ``client``: every client aligns its network to the one it was sent and sends the
            renumbered weights, which the server then only averages.
        repair: what the server does to the clients' mean, a name from :data:`weldnet.fusion.REPAIRS`.
        server_rows: unlabelled images held back from the clients, for rules and repairs that look at activations.
        evaluate_every: rounds between two evaluations of the global model; the last round is always evaluated.
        seed: of everything random.
        threads: of PyTorch, in clients and on the server; results are bit-equal only for equal numbers.
        device: where clients train, and the server aligns and evaluates.
    """

    model_config = _STRICT

    dataset: str
    train_limit: Count | None = None
    test_limit: Count | None = None
    model: str = "mlp"
    model_options: dict[str, Any] = {}
    own_model_options: list[dict[str, Any]] = []
    projection: Count | None = None
    clients: Count = 5
    partition: PartitionConfig = PartitionConfig()
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_replies: Count = 1
    rounds: Count = 3
    local: LocalConfig = LocalConfig()
    algorithm: Named = "plain"
    rule: Named = "gamf"
    server_optimiser: Named = "none"
    initialisation: Literal["common", "own"] = "common"
    align_at: Literal["server", "client"] = "server"
    repair: str = "none"
    server_rows: Annotated[int, Field(ge=0)] = 0
    evaluate_every: Count = 1
    seed: Annotated[int, Field(ge=0)] = 0
    threads: Count = 1
    device: str = "cpu"

    @field_validator("algorithm")
    @classmethod
    def _known_algorithm(cls, value: Named) -> Named:
        make_algorithm(value)
        return value

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, value: Named) -> Named:
        make_rule(value)
        return value

    @field_validator("server_optimiser")
    @classmethod
    def _known_optimiser(cls, value: Named) -> Named:
        make_optimiser(value)
        return value

    @field_validator("repair")
    @classmethod
    def _known_repair(cls, value: str) -> str:
        make_repair(value, nn.Identity())
        return value

    @model_validator(mode="after")
    def _fits(self) -> FederatedConfig:
        rule = self.make_rule()
        if self.align_at == "client" and not (isinstance(rule, Matched) and rule.anchor == "reference"):
            raise ValueError(
                f"align_at is 'client', but by the rule {rule.name} a client cannot align to the model that it was "
                "sent; give an alignment method with the anchor 'reference'"
            )
        if self.align_at == "client" and (self.make_optimiser().needs_spread or self.repair != "none"):
            what = f"the repair {self.repair}" if self.repair != "none" else self.make_optimiser().name
            raise ValueError(
                f"align_at is 'client', for servers that know the sum of the clients' networks only, and {what} needs "
                "them one by one; give align_at 'server', or none"
            )
        if isinstance(rule, Matched) and rule.chosen.needs_data and self.align_at == "server" and not self.server_rows:
            raise ValueError(f"the rule {rule.name} looks at activations; give server_rows, such as 512")
        if not self.server_rows and {"data", "refit", "calibrate"} & set(self.repair.split("+")):
            raise ValueError(f"the repair {self.repair} looks at activations; give server_rows, such as 512")
        if isinstance(rule, FedMA) and rule.layers and self.repair != "none":
            raise ValueError(f"the rule {rule.name} goes without repair, but repair is {self.repair}; give none")
        if isinstance(rule, FedMA) and rule.layers and self.make_optimiser().name != "none":
            raise ValueError(
                f"the rule {rule.name} takes no server optimiser, but server_optimiser is "
                f"{self.make_optimiser().name}; give none"
            )
        if self.own_model_options and self.initialisation != "own":
            raise ValueError("own_model_options are of own initialisations, but initialisation is 'common'; give 'own'")
        if self.own_model_options and not rule.any_width:
            raise ValueError(
                f"the rule {rule.name} needs equal widths, which own_model_options may change; give optimal_transport"
            )
        if self.min_replies > self.selected:
            raise ValueError(
                f"min_replies is {self.min_replies}, but only {self.selected} clients are asked in a round"
            )
        return self

    @property
    def selected(self) -> int:
        """How many clients are asked in a round."""
        return max(1, round(self.participation * self.clients))

    def make_rule(self) -> Rule:
        """Return the rule as a value."""
        return make_rule(self.rule)

    def make_algorithm(self) -> ClientAlgorithm:
        """Return the client algorithm as a value."""
        return make_algorithm(self.algorithm)

    def make_optimiser(self) -> ServerOptimiser:
        """Return the server optimiser as a value."""
        return make_optimiser(self.server_optimiser)

    def key(self) -> str:
        """Return a hash of everything that decides the rounds; how many there are, and are evaluated, does not."""
        said = self.model_dump(exclude={"rounds", "evaluate_every"}, exclude_defaults=True)
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """Return the settings as a config file."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)

    @staticmethod
    def make(values: Mapping[str, Any], where: str = "config") -> FederatedConfig:
        """Check settings.

        Args:
            values: by key.
            where: they come from, for the message.

        Raises:
            ConfigError: an unknown key, or a value that means nothing; one line, with the way out.

        >>> FederatedConfig.make({"dataset": "digits", "rule": "gamf", "algorithm": "moon"}).make_rule().name
        'gamf'
        """
        try:
            return FederatedConfig(**{str(key).replace("-", "_"): value for key, value in values.items()})
        except ValidationError as error:
            raise ConfigError(f"{where}: {_reason(error.errors()[0])}") from error

    @staticmethod
    def read(path: str | os.PathLike[str]) -> FederatedConfig:
        """Read a config file; errors as :meth:`make`."""
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"config {str(path)!r} cannot be read: {why}; give a YAML file") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"config {str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(loaded, dict):
            raise ConfigError(
                f"config {str(path)!r} holds no settings; write 'key: value' lines, 'dataset: mnist' first"
            )
        return FederatedConfig.make(loaded, f"config {str(path)!r}")


_PARTS: dict[str, type[BaseModel]] = {"partition": PartitionConfig, "local": LocalConfig}


def _reason(fault: Any) -> str:
    path = [str(part) for part in fault["loc"] if str(part) not in ("str", "dict[str,any]")]
    where = ".".join(path)
    message = " ".join(str(fault["msg"]).removeprefix("Value error, ").split())
    if fault["type"] == "missing":
        return f"{where} is missing; say it, such as 'dataset: mnist'"
    if fault["type"] != "extra_forbidden":
        shown = f"{where}: {fault['input']!r} is no good: " if path else ""
        return shown + message[:1].lower() + message[1:]
    known = list((_PARTS[path[0]] if len(path) > 1 else FederatedConfig).model_fields)
    close = difflib.get_close_matches(path[-1], known, 2)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"the keys are {', '.join(known)}"
    return f"unknown key {where!r}; {hint}"
