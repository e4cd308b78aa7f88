"""Server optimisers: what is done with the step from the old global model to the clients' mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from weldnet.errors import UsageError

__all__ = ["OPTIMISERS", "FedAdam", "FedAvgM", "FedExP", "NoOptimiser", "ServerOptimiser", "Step", "make_optimiser"]

State = dict[str, Tensor]


@final
@dataclass(frozen=True, eq=False)
class Step:
    """What an optimiser works on.

    Args:
        reference: the old global model.
        mean: the clients' mean, after matching.
        learned: the tensors that are optimised; all others (buffers) are taken from the mean.
        spread: weighted mean of the clients' squared distances from the reference, over what is learned.
    """

    reference: Mapping[str, Tensor]
    mean: Mapping[str, Tensor]
    learned: frozenset[str]
    spread: float

    @property
    def changes(self) -> dict[str, Tensor]:
        """The mean change of each learned tensor, in float64 (or complex128)."""
        return {
            name: _wide(self.mean[name]) - _wide(self.reference[name]) for name in self.mean if name in self.learned
        }

    def moved(self, by: Mapping[str, Tensor]) -> State:
        """Return the mean with its learned tensors put where the reference is moved to."""
        return {
            name: (_wide(self.reference[name]) + by[name]).to(tensor.dtype) if name in by else tensor
            for name, tensor in self.mean.items()
        }


@runtime_checkable
class ServerOptimiser(Protocol):
    """An optimiser is a frozen value; its state, tensors by name, is given and returned, so that it can be saved.

    ``needs_spread`` says whether it asks how far each client went, which a sum of their networks does not tell.
    """

    @property
    def name(self) -> str: ...
    @property
    def needs_spread(self) -> bool: ...

    def __call__(self, step: Step, state: Mapping[str, Tensor], /) -> tuple[State, State, dict[str, float]]:
        """Return the new global model, the new state, and numbers for the record. ``state`` is empty at first."""
        ...


@final
@dataclass(frozen=True, kw_only=True)
class NoOptimiser:
    """Take the clients' mean as it is."""

    name = "none"
    needs_spread = False

    def __call__(self, step: Step, state: Mapping[str, Tensor], /) -> tuple[State, State, dict[str, float]]:
        """See :class:`ServerOptimiser`."""
        return dict(step.mean), {}, {}


@final
@dataclass(frozen=True, kw_only=True)
class FedAvgM:
    """Momentum on the server: ``m = momentum m + d``, ``w = w + lr m``, with d the clients' mean change.

    Args:
        lr: the server's step size.
        momentum: 0..1, 1 not included.

    Source: Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
    https://arxiv.org/abs/1909.06335.
    """

    lr: float = 1.0
    momentum: float = 0.9
    name = "fedavgm"
    needs_spread = False

    def __post_init__(self) -> None:
        _require(self, lr=self.lr > 0, momentum=0 <= self.momentum < 1)

    def __call__(self, step: Step, state: Mapping[str, Tensor], /) -> tuple[State, State, dict[str, float]]:
        """See :class:`ServerOptimiser`."""
        new = {
            f"momentum/{name}": self.momentum * _known(state, f"momentum/{name}", change) + change
            for name, change in step.changes.items()
        }
        return step.moved({n: self.lr * new[f"momentum/{n}"] for n in step.changes}), new, {}


@final
@dataclass(frozen=True, kw_only=True)
class FedAdam:
    """Adam on the server, without bias correction.

    ``m = beta1 m + (1 - beta1) d``, ``v = beta2 v + (1 - beta2) d^2``, ``w = w + lr m / (sqrt(v) + tau)``, with d the
    clients' mean change, m = 0 and v = tau^2 at first.

    Args:
        lr: the server's step size.
        beta1: 0..1, 1 not included.
        beta2: 0..1, 1 not included.
        tau: how much the steps adapt; above 0.

    Source: Reddi et al., "Adaptive Federated Optimization", https://arxiv.org/abs/2003.00295, algorithm 2.
    """

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    name = "fedadam"
    needs_spread = False

    def __post_init__(self) -> None:
        _require(self, lr=self.lr > 0, beta1=0 <= self.beta1 < 1, beta2=0 <= self.beta2 < 1, tau=self.tau > 0)

    def __call__(self, step: Step, state: Mapping[str, Tensor], /) -> tuple[State, State, dict[str, float]]:
        """See :class:`ServerOptimiser`."""
        new: State = {}
        by: State = {}
        for name, change in step.changes.items():
            first = self.beta1 * _known(state, f"first/{name}", change) + (1 - self.beta1) * change
            second = _known(state, f"second/{name}", change.abs(), self.tau**2)
            second = self.beta2 * second + (1 - self.beta2) * change.abs().square()
            new[f"first/{name}"], new[f"second/{name}"] = first, second
            by[name] = self.lr * first / (second.sqrt() + self.tau)
        return step.moved(by), new, {}


@final
@dataclass(frozen=True, kw_only=True)
class FedExP:
    """A longer step where the clients' changes disagree: extrapolation.

    ``w = w + eta d`` with ``eta = max(1, sum_k p_k |d_k|^2 / (2 (|d|^2 + epsilon)))``, d_k the clients' changes, p_k
    their shares (1 / M in the paper) and d the mean change.

    Args:
        epsilon: keeps the step finite.

    Source: Jhunjhunwala et al., "FedExP: Speeding Up Federated Averaging via Extrapolation", ICLR 2023,
    https://arxiv.org/abs/2301.09604, equation 4.
    """

    epsilon: float = 1e-3
    name = "fedexp"
    needs_spread = True

    def __post_init__(self) -> None:
        _require(self, epsilon=self.epsilon > 0)

    def __call__(self, step: Step, state: Mapping[str, Tensor], /) -> tuple[State, State, dict[str, float]]:
        """See :class:`ServerOptimiser`."""
        changes = step.changes
        square = sum(float(change.abs().square().sum()) for change in changes.values())
        size = max(1.0, step.spread / (2 * (square + self.epsilon)))
        return step.moved({name: size * change for name, change in changes.items()}), {}, {"server_step": size}


OPTIMISERS: dict[str, type[ServerOptimiser]] = {kind.name: kind for kind in (NoOptimiser, FedAvgM, FedAdam, FedExP)}
"""The server optimisers by name."""


def make_optimiser(optimiser: str | ServerOptimiser | Mapping[str, Any]) -> ServerOptimiser:
    """Return a server optimiser by name, from a mapping with ``name`` and options, or as it is.

    Raises:
        UsageError: an unknown name or option; the message lists the known ones.

    >>> make_optimiser({"name": "fedavgm", "momentum": 0.5})
    FedAvgM(lr=1.0, momentum=0.5)
    """
    if not isinstance(optimiser, str | Mapping):
        return optimiser
    return build(OPTIMISERS, "server optimiser", optimiser)


def build(kinds: Mapping[str, type[Any]], what: str, given: str | Mapping[str, Any]) -> Any:
    """Make a frozen value from its name, or from a mapping with ``name`` and options.

    Raises:
        UsageError: an unknown name or option, or a value that means nothing.
    """
    options: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {"name": given}
    name = str(options.pop("name", None))
    if name not in kinds:
        raise UsageError(f"unknown {what} {name!r}; weldnet has {', '.join(kinds)}")
    known = {f.name: f.default for f in dataclasses.fields(kinds[name])}
    for option, value in options.items():
        if option not in known:
            raise UsageError(f"{name} has no option {option!r}; it has {', '.join(known) or 'none'}")
        if isinstance(known[option], float) and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UsageError(f"{name}: {option} is {value!r}; give a number")
    return kinds[name](**options)


def _known(state: Mapping[str, Tensor], key: str, like: Tensor, start: float = 0.0) -> Tensor:
    return state[key].to(like) if key in state else torch.full_like(like, start)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64))


def _require(optimiser: ServerOptimiser, **fine: bool) -> None:
    for option, good in fine.items():
        if not good:
            raise UsageError(f"{optimiser.name}: {option} is {getattr(optimiser, option)}, which is out of range")
