"""How a round goes: in one exchange with the clients, or in one a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from weldnet._arrays import find_device
from weldnet.federated._aggregate import Aggregated, aggregate
from weldnet.federated._blueprint import Blueprint
from weldnet.federated._federation import Federation, Order, derive_seed
from weldnet.federated._layers import LayerRounds, Matching, cut_out
from weldnet.federated._matched import FedMA, Matched
from weldnet.federated._rule import FedAvg, Rule
from weldnet.federated._update import ClientUpdate

__all__ = ["Course", "make_course"]

State = Mapping[str, Tensor]


class Course(Protocol):
    """The course of a run's rounds; between two rounds all that it knows is in ``tensors``."""

    def orders(self, number: int, state: State) -> list[Order]:
        """Return what clients are asked next in a round, sorted by client."""
        ...

    def receive(self, number: int, state: State, updates: Sequence[ClientUpdate]) -> Aggregated | None:
        """Take what came back; return how the round ended, or None if there is another exchange in it."""
        ...

    @property
    def tensors(self) -> State:
        """What to keep for the next round."""
        ...

    def restore(self, tensors: State, state: State) -> None:
        """Go on from what was kept, and from the global model."""
        ...


def make_course(federation: Federation) -> Course:
    """Return the course that a config's rule asks for."""
    rule = federation.config.make_rule()
    return Layered(federation, rule) if isinstance(rule, FedMA) and rule.layers else Whole(federation)


class Whole:
    """One exchange a round: all clients get the global model, and send it back trained."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self.tensors: State = {}

    def orders(self, number: int, state: State) -> list[Order]:
        """See :class:`Course`."""
        return [Order(client=client, round=number, state=state) for client in self._federation.chosen(number)]

    def receive(self, number: int, state: State, updates: Sequence[ClientUpdate]) -> Aggregated | None:
        """See :class:`Course`."""
        federation, config = self._federation, self._federation.config
        found = aggregate(
            updates,
            state,
            number,
            rule=self._rule(),
            blueprint=federation.blueprint,
            optimiser=config.make_optimiser(),
            optimiser_state=self.tensors,
            began=federation.began(self.orders(number, state)[0]),
            min_updates=config.min_replies,
            seed=derive_seed(config.seed, "server"),
            data=federation.server_data,
            repair=config.repair,
            device=config.device,
        )
        self.tensors = found.optimiser_state
        return found

    def restore(self, tensors: State, state: State) -> None:
        """See :class:`Course`."""
        self.tensors = dict(tensors)

    def _rule(self) -> Rule:
        rule = self._federation.config.make_rule()
        if self._federation.config.align_at == "client":
            assert isinstance(rule, Matched)
            return FedAvg(weighting=rule.weighting)
        return rule


class Layered:
    """FedMA: an exchange before the first layer is matched, and one after each."""

    def __init__(self, federation: Federation, rule: FedMA) -> None:
        self._federation, self._rule = federation, rule
        self._whole: Blueprint = federation.blueprint
        self._targets: dict[str, dict[str, Tensor]] = {}
        self._begin()

    def _begin(self) -> None:
        self._cycle: LayerRounds | None = None
        self._matchings: list[Matching] = []

    def orders(self, number: int, state: State) -> list[Order]:
        """See :class:`Course`."""
        if self._matchings:
            last = self._matchings[-1]
            return [
                Order(client=c, round=number, state=s, phase=len(self._matchings), frozen=last.frozen)
                for c, s in sorted(last.states.items())
            ]
        own = self._federation.blueprint.structure
        whole = self._whole.structure
        return [
            Order(client=c, round=number, state=cut_out(state, whole, own, self._targets.get(c, {})))
            for c in self._federation.chosen(number)
        ]

    def receive(self, number: int, state: State, updates: Sequence[ClientUpdate]) -> Aggregated | None:
        """See :class:`Course`."""
        if self._cycle is None:
            seed = derive_seed(self._federation.config.seed, "layers", number)
            device = find_device(self._federation.config.device)
            self._cycle = LayerRounds(self._rule.method, self._federation.blueprint, self._rule.weighting, seed, device)
        expected = self.orders(number, state)[0].state
        if self._cycle.finished:
            return self._finish(updates, expected, state)
        matching = self._cycle.match(updates, expected)
        enough = max(2, self._federation.config.min_replies)
        if matching is None or len(matching.states) < enough:
            return self._skip(state, f"fewer than {enough} sound updates to match in phase {len(self._matchings)}")
        self._matchings.append(matching)
        return None

    @property
    def tensors(self) -> State:
        """See :class:`Course`."""
        return {f"{client}/{space}": t for client, spaces in self._targets.items() for space, t in spaces.items()}

    def restore(self, tensors: State, state: State) -> None:
        """See :class:`Course`."""
        self._targets = {}
        for key, targets in tensors.items():
            client, _, space = key.partition("/")
            self._targets.setdefault(client, {})[space] = targets
        mine = self._federation.blueprint
        same = all(tuple(state[name].shape) == shape for name, shape in mine.structure.shapes.items())
        self._whole = mine if same else Blueprint.of(mine.module(state), mine.example_input)
        self._begin()

    def _finish(self, updates: Sequence[ClientUpdate], expected: State, state: State) -> Aggregated:
        assert self._cycle is not None
        found = self._cycle.finish(updates, expected)
        out = {entry.client for entry in self._cycle.dropped}
        kept = tuple(sorted({update.client for update in updates} - out))
        least = self._federation.config.min_replies
        if found is None or len(kept) < least:
            return self._skip(state, f"{len(kept)} sound updates after the last layer, and {least} are needed")
        self._whole = self._cycle.blueprint
        grew = any(m.units != self._federation.blueprint.structure.space(m.space).size for m in self._matchings)
        # Without growth the global network's units are everybody's, and nothing is to be cut.
        self._targets = {c: {m.space: m.targets[c] for m in self._matchings} for c in kept} if grew else {}
        moved = {c: sum(m.moved[c] for m in self._matchings) / len(self._matchings) for c in kept}
        stats = {
            "moved": sum(moved.values()) / len(moved),
            "moved_max": max(moved.values()),
            "units": float(sum(m.units for m in self._matchings)),
            "seconds": sum(m.seconds for m in self._matchings),
        }
        dropped = tuple(self._cycle.dropped) if self._cycle else ()
        self._begin()
        return Aggregated(state=found, clients=kept, dropped=dropped, moved=moved, stats=stats)

    def _skip(self, state: State, why: str) -> Aggregated:
        dropped = tuple(self._cycle.dropped) if self._cycle else ()
        self._begin()
        return Aggregated(state=state, clients=(), dropped=dropped, skipped=why)
