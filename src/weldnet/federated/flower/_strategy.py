"""A Flower strategy whose aggregation is weldnet's: any rule, any server optimiser, on Flower's Message API."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import Result
from torch import Tensor

from weldnet.activations import Inputs
from weldnet.checkpoints import load, read_metadata, save
from weldnet.errors import FederatedError, UsageError
from weldnet.federated import (
    Blueprint,
    Rule,
    ServerOptimiser,
    aggregate,
    make_optimiser,
    make_rule,
)
from weldnet.federated.flower._flower_round import FlowerRound
from weldnet.federated.flower._messenger import Messenger
from weldnet.federated.flower._wire import to_record, to_state

__all__ = ["FusionStrategy", "refuse_masked"]

_LOG = logging.getLogger("weldnet.federated")
_CONTENT = "weldnet-flower-strategy"


class FusionStrategy(FlowerFedAvg):
    """Aggregates by a rule of :mod:`weldnet.federated`; for Flower apps with clients of their own.

    Clients reply with one array record (their state dict) and one metric record that holds ``num-examples``, and may
    hold ``partition-id`` (a name that stays; else the node's number is used), ``classes`` with ``class-counts`` (lists,
    for rules that need them) and numbers for the records. Replies are taken in the order of the clients' names; error
    replies, missing clients and updates that do not fit are named and left out. Types are kept: counters stay integers.

    Args:
        blueprint: what is known of the model; :meth:`Blueprint.of` makes it.
        rule: a name for :func:`weldnet.federated.make_rule`, or a rule.
        optimiser: a name for :func:`weldnet.federated.make_optimiser`, or a server optimiser.
        nodes: how many nodes to wait for before a round.
        min_replies: how many sound updates a round needs; with fewer, the round is skipped and the model kept. As many
            nodes must be there for a round to begin.
        patience: seconds to wait for ``nodes`` nodes; then those that are there will do.
        share: of the nodes that take part in a round, 0..1.
        began: whether the clients of a round (1, 2, ...) train from the model that they are sent; not so in the first
            one with own initialisations.
        checkpoint: a file for the server's state after every round; none if None.
        resume: whether to go on from the checkpoint, if there is one.
        secure_aggregation: whether clients mask what they send; then only sums may be formed.
        on_round: called with every :class:`FlowerRound`.
        seed: of everything random.
        device: where to compute: alignment, and the networks that methods and repairs run on ``data``.
        data: unlabelled inputs on the server, for methods that look at activations.

    Raises:
        UsageError: arguments that do not go together.
        FederatedError: the checkpoint is none of this strategy's.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> strategy = FusionStrategy(Blueprint.of(net, torch.zeros(1, 2)), rule="gamf", nodes=2)
        >>> strategy.rule.name
        'gamf'
    """

    def __init__(
        self,
        blueprint: Blueprint,
        *,
        rule: str | Rule = "gamf",
        optimiser: str | ServerOptimiser = "none",
        nodes: int = 2,
        min_replies: int = 1,
        patience: float = 600.0,
        share: float = 1.0,
        began: Callable[[int], bool] = lambda number: True,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
        secure_aggregation: bool = False,
        on_round: Callable[[FlowerRound], None] = lambda found: None,
        seed: int = 0,
        device: str | torch.device | None = None,
        data: Inputs | None = None,
    ) -> None:
        super().__init__(fraction_train=share, fraction_evaluate=0.0, min_available_nodes=nodes)
        self.rule, self.optimiser = make_rule(rule), make_optimiser(optimiser)
        if secure_aggregation:
            refuse_masked(self.rule, self.optimiser)
        if not 0 < share <= 1:
            raise UsageError(f"share is {share}; give a number above 0, at most 1")
        self.blueprint, self._began, self._min_replies = blueprint, began, min_replies
        self._messenger, self._share, self._on_round = Messenger(nodes, min_replies, patience), share, on_round
        self._seed, self._device, self._data = seed, device, data
        self._checkpoint = Path(checkpoint) if checkpoint is not None else None
        self._reference: dict[str, Tensor] = {}
        self._optimiser_state: dict[str, Tensor] = {}
        self._start, self.done = 0.0, 0
        if resume and self._checkpoint is not None and self._checkpoint.exists():
            self._restore(self._checkpoint)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        *args: Any,
        **options: Any,
    ) -> Result:
        """Run rounds up to a number, as Flower's strategies do; a resumed one goes on after those that are done.

        Args:
            grid: Flower's.
            initial_arrays: the first global model; a resumed run has its own.
            num_rounds: how many there are in all.
            timeout: seconds that a round's clients have to answer.
            *args: as Flower's.
            **options: as Flower's.
        """
        arrays = to_record(self._reference) if self.done else initial_arrays
        left = num_rounds - self.done
        if left <= 0:
            result = Result()
            result.arrays = arrays
            return result
        return super().start(grid, arrays, left, timeout, *args, **options)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Keep the global model, choose the nodes, and write them.

        Raises:
            FederatedError: too few nodes came.
        """
        self._start = time.perf_counter()
        self._reference = to_state(arrays)
        number = self.done + 1
        chosen = self._choose(self._messenger.wait(grid), number, grid)
        keys = (self.arrayrecord_key, self.configrecord_key)
        return self._messenger.messages({node: (arrays, dict(config)) for node in chosen}, number, keys)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Make the next global model of what came.

        Returns:
            The model, and numbers of the round; the model is the old one if the round was skipped.

        Raises:
            UsageError: the rule cannot work with what was asked of it, or replies are masked.
        """
        number = self.done + 1
        found = self._messenger.read(replies, self.arrayrecord_key)
        if found.masked:
            refuse_masked(self.rule, self.optimiser, always=True)
        aggregated = aggregate(
            found.updates,
            self._reference,
            number,
            rule=self.rule,
            blueprint=self.blueprint,
            optimiser=self.optimiser,
            optimiser_state=self._optimiser_state,
            began=self._began(number),
            min_updates=self._min_replies,
            seed=self._seed,
            device=self._device,
            data=self._data,
        )
        done = FlowerRound(
            number=number,
            aggregated=aggregated,
            missing=self._messenger.silent(found),
            failed=found.failed,
            values={update.client: update.values for update in found.updates},
            examples={update.client: update.examples for update in found.updates},
            seconds=time.perf_counter() - self._start,
        )
        self._reference, self._optimiser_state = dict(aggregated.state), dict(aggregated.optimiser_state)
        self.done = number
        if self._checkpoint is not None:
            self._save(self._checkpoint)
        _LOG.info("%s", done)
        self._on_round(done)
        return to_record(aggregated.state), MetricRecord(done.numbers)

    def _choose(self, nodes: list[int], number: int, grid: Grid) -> list[int]:
        """Choose who takes part, by name, so that the choice does not hang on the numbers that nodes happen to have."""
        count = max(self._min_replies, round(self._share * len(nodes)))
        if count >= len(nodes):
            return nodes
        names = self._messenger.named(nodes, grid)
        ordered = sorted(nodes, key=lambda node: names[node])
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        return [ordered[i] for i in sorted(torch.randperm(len(ordered), generator=generator)[:count].tolist())]

    def _save(self, path: Path) -> None:
        tensors = {f"global/{name}": tensor for name, tensor in self._reference.items()}
        tensors |= {f"optimiser/{name}": tensor for name, tensor in self._optimiser_state.items()}
        save(tensors, path, metadata={**self._identity, "round": str(self.done)})

    @property
    def _identity(self) -> dict[str, str]:
        return {"content": _CONTENT, "rule": self.rule.name, "optimiser": self.optimiser.name}

    def _restore(self, path: Path) -> None:
        metadata = {"optimiser": self.optimiser.name, **read_metadata(path)}  # older files do not name it
        if {key: metadata.get(key) for key in self._identity} != self._identity:
            raise FederatedError(
                f"{path} is no state of a strategy with the rule {self.rule.name} and the optimiser "
                f"{self.optimiser.name}; give its own, or delete it"
            )
        for key, tensor in load(path).items():
            part, _, name = key.partition("/")
            (self._reference if part == "global" else self._optimiser_state)[name] = tensor
        model = self.blueprint.model.state_dict()
        other = sorted(
            name
            for name in model.keys() | self._reference.keys()
            if name not in model or name not in self._reference or model[name].shape != self._reference[name].shape
        )
        if other:
            raise FederatedError(f"{path} is of another model ({other[0]!r} differs); give that model, or delete it")
        # Files sort their tensors; the order of sums, and with it their rounding, shall be the model's.
        self._reference = {name: self._reference[name] for name in model}
        self.done = int(metadata["round"])


def refuse_masked(rule: Rule, optimiser: ServerOptimiser, *, always: bool = False) -> None:
    """Refuse to match networks that are masked, or to ask how far each went, with the way out.

    Args:
        rule: of the server.
        optimiser: of the server.
        always: refuse plain averages too: these replies are parts of a protocol that the strategy does not speak.

    Raises:
        UsageError: the rule or the optimiser needs each client's plain weights, or the replies are masked.
    """
    if not rule.name.startswith("fedavg"):
        raise UsageError(
            f"{rule.name} needs each client's plain weights on the server, and under secure aggregation only their sum "
            "is known: align on the clients (align_at='client'), and let Flower's SecAgg+ form the sum"
        )
    if optimiser.needs_spread:
        raise UsageError(
            f"{optimiser.name} needs each client's distance from the global model, and under secure aggregation only "
            "the sum of their networks is known: give the server optimiser fedavgm, fedadam or none"
        )
    if always:
        raise UsageError(
            f"replies are parts of Flower's SecAgg protocol, of which {rule.name} here cannot form the sum: let "
            "Flower's SecAggPlusWorkflow form it, or take its mod off the clients"
        )
