"""Aggregate: from a round's updates to the next global model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from weldnet._arrays import find_device
from weldnet.activations import Inputs
from weldnet.errors import UsageError
from weldnet.federated._blueprint import Blueprint
from weldnet.federated._repaired import repaired
from weldnet.federated._rule import Rule, Setting
from weldnet.federated._rules import make_rule
from weldnet.federated._server import NoOptimiser, ServerOptimiser, Step, make_optimiser
from weldnet.federated._update import ClientUpdate, Dropped, Screen
from weldnet.fusion import Repair

__all__ = ["Aggregated", "aggregate"]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Aggregated:
    """The next global model, and what happened on the way.

    Args:
        state: the model: a new one, or the reference's tensors if the round was skipped.
        clients: who is in it, sorted by name.
        dropped: who is not, and why.
        skipped: why the round was skipped; empty if it was not.
        optimiser_state: of the server optimiser, for the next round.
        shares: of the clients in the mean, by name.
        moved: share of units that changed their number, by client; empty for rules that match nothing.
        stats: numbers for the record: ``moved`` and ``moved_max`` over the clients, ``objective``, ``spread``,
            ``seconds``, and the server optimiser's.
    """

    state: Mapping[str, Tensor]
    clients: tuple[str, ...]
    dropped: tuple[Dropped, ...]
    skipped: str = ""
    optimiser_state: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    shares: Mapping[str, float] = field(default_factory=dict[str, float])
    moved: Mapping[str, float] = field(default_factory=dict[str, float])
    stats: Mapping[str, float] = field(default_factory=dict[str, float])


def aggregate(
    updates: Sequence[ClientUpdate],
    reference: Mapping[str, Tensor],
    round: int,
    *,
    rule: str | Rule,
    blueprint: Blueprint,
    optimiser: str | ServerOptimiser = "none",
    optimiser_state: Mapping[str, Tensor] | None = None,
    began: bool = True,
    min_updates: int = 1,
    seed: int = 0,
    device: str | torch.device | None = None,
    data: Inputs | None = None,
    repair: str | Repair = "none",
) -> Aggregated:
    """Combine the clients' networks into the next global model.

    A pure function: nothing given is changed, and neither the order in which updates arrive nor anything else but the
    arguments has a say. Updates that do not fit are dropped and named; if fewer than ``min_updates`` are left, the
    round is skipped and the model stays.

    Args:
        updates: what the clients sent, in any order.
        reference: the global model that the round began with.
        round: its number; the seed of anything random derives from it.
        rule: a name for :func:`make_rule` or a rule.
        blueprint: what is known of the model, made once a run.
        optimiser: a name for :func:`make_optimiser` or a server optimiser. It has no say where the clients did not
            begin from the reference: there is no step from one to the other.
        optimiser_state: from the round before; None at first.
        began: whether the clients began from the reference; not so in the first round with own initialisations.
        min_updates: how many sound updates a round needs.
        seed: of everything random.
        device: where to align, run networks and repair; the tensors' own device if None. The model stays where the
            reference is.
        data: unlabelled inputs on the server, for methods and repairs that look at activations.
        repair: what is done to the clients' mean: a name from :data:`weldnet.fusion.REPAIRS` or a repair. Any but
            ``"none"`` has all clients in memory at once.

    Raises:
        UsageError: a rule, method or device that cannot work with these arguments whatever the clients send.
        FusionError: a method that makes the network wider.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> reference, w = net.state_dict(), torch.ones(1, 2)
        >>> sent = [ClientUpdate(client=str(k), state={"weight": k * w}, examples=10) for k in (1, 2)]
        >>> blueprint = Blueprint.of(net, torch.zeros(1, 2))
        >>> aggregate(sent, reference, 1, rule="fedavg", blueprint=blueprint).state["weight"]
        tensor([[1.5000, 1.5000]])
    """
    rule, optimiser = make_rule(rule), make_optimiser(optimiser)
    if min_updates < 1:
        raise UsageError(f"min_updates is {min_updates}; give 1 or more")
    start = time.perf_counter()
    screen = Screen(updates, reference, blueprint, any_width=rule.any_width, classes=rule.needs_classes)
    setting = Setting(
        reference=reference,
        blueprint=blueprint,
        began=began,
        seed=seed * 1_000_003 + round,
        device=find_device(device),
        data=data,
    )
    with torch.no_grad():
        combined = rule(screen, setting)
    if combined is not None and repair != "none":
        combined = replace(combined, state=repaired(repair, combined, updates, setting))
    dropped = tuple(sorted(screen.dropped, key=lambda entry: (entry.client, entry.reason)))
    kept = () if combined is None else tuple(sorted(combined.shares))
    before = dict(optimiser_state or {})
    if combined is None or len(kept) < min_updates:
        why = f"{len(kept)} sound updates of {len(updates)}, and {min_updates} are needed"
        stats = {"seconds": time.perf_counter() - start}
        state = {name: tensor.detach().clone() for name, tensor in reference.items()}
        return Aggregated(state=state, clients=kept, dropped=dropped, skipped=why, optimiser_state=before, stats=stats)
    chosen = optimiser if began else NoOptimiser()
    step = Step(reference, combined.state, blueprint.parameters, combined.spread)
    state, after, numbers = chosen(step, before)
    stats = {**numbers, "spread": combined.spread}
    if combined.moved:
        stats |= {
            "moved": sum(combined.moved.values()) / len(combined.moved),
            "moved_max": max(combined.moved.values()),
        }
    if combined.objective is not None:
        stats["objective"] = combined.objective
    return Aggregated(
        state=state,
        clients=kept,
        dropped=dropped,
        optimiser_state=after if began else before,
        shares=combined.shares,
        moved=combined.moved,
        stats={**stats, "seconds": time.perf_counter() - start},
    )
