"""The steps of a fusion: prepared networks, aligned ones, their average; each can be used more than once."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from weldnet._modules import bare, home, placed
from weldnet.activations import Inputs
from weldnet.alignment import (
    Alignment,
    AlignmentMethod,
    Identity,
    Problem,
    named_states,
    require_width,
    transport,
    truncation,
)
from weldnet.assignment import Coupling, Plan
from weldnet.checkpoints import load_into, match_keys, match_states, tensors_sha256, validate_finite
from weldnet.errors import AlignmentError, FusionError, ModelError, StructureError, UsageError, WidthError
from weldnet.fusion._average import average, normalise_weights
from weldnet.fusion._averaged import Averaged
from weldnet.structure import Referee, Structure, capture, require_correspondence
from weldnet.structure import check as run_check

__all__ = [
    "Aligned",
    "Clock",
    "Parents",
    "Prepared",
    "align_parents",
    "average_parents",
    "grown_spaces",
    "leave_parents",
    "naive_average",
    "prepare",
    "universe_size",
]

logger = logging.getLogger("weldnet")


@dataclass(frozen=True)
class Parents:
    """The networks by name: as modules, as state dicts, and with their shares in the average.

    ``into`` names the one whose class, widths and order the fused one has.
    """

    modules: dict[str, nn.Module]
    states: dict[str, Mapping[str, Tensor]]
    shares: dict[str, float]
    into: str

    @property
    def first(self) -> nn.Module:
        """The network in whose order the fused one is."""
        return self.modules[self.into]

    def fingerprints(self) -> dict[str, str]:
        """Return a SHA-256 of each network's tensors."""
        return {name: tensors_sha256(state) for name, state in self.states.items()}


@dataclass(frozen=True)
class Prepared:
    """Networks whose structure is known and proven.

    Args:
        parents: the networks.
        structure: of the fused network, and of all whose widths are the same.
        structures: of those whose widths are others, by name.
        proof: what the permutation test saw, or why it was not made.
        checked: whether it was made; transports are then compared too.
        example_input: what the networks take.
        seed: of everything random.
    """

    parents: Parents
    structure: Structure
    proof: str
    checked: bool
    example_input: Any
    seed: int
    structures: Mapping[str, Structure] = field(default_factory=dict[str, Structure])

    def structure_of(self, name: str) -> Structure:
        """Return the structure of one network."""
        return self.structures.get(name, self.structure)

    def on(self, device: torch.device | None) -> Prepared:
        """Return the same with all networks on one device, the one of the network in whose order the fused one is if
        None; networks that lie elsewhere are copied.
        """
        target = device or home(self.parents.first)
        modules = {name: placed(module, target) for name, module in self.parents.modules.items()}
        if all(modules[name] is module for name, module in self.parents.modules.items()):
            return self
        return replace(self, parents=replace(self.parents, modules=modules, states=named_states(modules)))

    def carried(self, couplings: Mapping[str, Mapping[str, Coupling]]) -> dict[str, dict[str, Tensor]]:
        """Return all parents' tensors in the universe."""
        return {
            name: transport(state, self.structure_of(name), couplings[name], self.structure)
            for name, state in self.parents.states.items()
        }


@dataclass(frozen=True)
class Aligned:
    """Networks in one order.

    Args:
        alignment: who went where.
        states: the parents' tensors in the universe, by name; empty where it has more units than all of them.
        errors: by name, the largest relative change of a parent's output by its transport; empty if unchecked, and
            without those that have soft couplings: these do change their function.
    """

    alignment: Alignment
    states: Mapping[str, Mapping[str, Tensor]]
    errors: Mapping[str, float]


def prepare(
    networks: Any,
    example_input: Any,
    clock: Clock,
    *,
    outputs: str | Sequence[str] | None = None,
    route: str = "auto",
    weights: Sequence[float] | Mapping[str, float] | None = None,
    into: str | None = None,
    check: bool = True,
    seed: int = 0,
) -> Prepared:
    """Name the networks, capture their structure, and prove it on each; arguments and errors as `weldnet.fuse`."""
    parents = _gather(networks, weights, into)
    with clock.step("capture"):
        structure = capture(parents.first, example_input, outputs, route=route)
        structures = _other_widths(parents, structure, lambda net: capture(net, example_input, outputs, route=route))
    prepared = Prepared(parents, structure, "not made (check=False)", check, example_input, seed, structures)
    with clock.step("check"):
        return replace(prepared, proof=_prove(prepared)) if check else prepared


def align_parents(
    prepared: Prepared,
    method: AlignmentMethod,
    clock: Clock,
    *,
    data: Inputs | None = None,
) -> Aligned:
    """Align the networks, where the first one lies, and carry them to the universe; errors as `weldnet.fuse`."""
    parents = prepared.parents
    order = sorted(parents.states, key=lambda name: name != parents.into)  # the universe's network first
    with clock.step("align"), torch.no_grad():
        problem = Problem(
            prepared.structure,
            {name: parents.states[name] for name in order},
            seed=prepared.seed,
            device=home(parents.first),
            networks=parents.modules,
            data=data,
            structures=prepared.structures,
        )
        require_width(method, problem)
        found = method(problem)
        alignment = replace(found, couplings={name: found[name] for name in parents.states})
    if grown_spaces(alignment, prepared.structure):
        return Aligned(alignment, {}, {})  # there is no network of that width to carry them to yet
    with clock.step("transport"):
        moved = prepared.carried(alignment.couplings)
        errors = _equivalences(prepared, alignment, moved) if prepared.checked else {}
    return Aligned(alignment, moved, errors)


def average_parents(prepared: Prepared, aligned: Aligned) -> Averaged:
    """Average aligned networks: what a repair works on.

    Raises:
        FusionError: the alignment's universe has more units than the networks, which is a matter of the size.
    """
    parents = prepared.parents
    if not aligned.states:
        raise FusionError(f"{aligned.alignment.method} grows the network; weldnet.fuse makes such networks")
    return Averaged(
        _with_state(parents.first, average(list(aligned.states.values()), list(parents.shares.values()))),
        parents.modules,
        parents.shares,
        prepared.structure,
        aligned.alignment,
        structures=prepared.structures,
        example_input=prepared.example_input,
        seed=prepared.seed,
    )


def grown_spaces(alignment: Alignment, structure: Structure) -> list[str]:
    """Return the spaces that have more units in the universe than in the structure: there they lie side by side."""
    spaces = next(iter(alignment.couplings.values()))
    return [name for name, coupling in spaces.items() if universe_size(coupling) > structure.space(name).size]


def universe_size(coupling: Coupling) -> int:
    """Return how many units the universe has in a coupling's space."""
    return coupling.values.shape[1] if isinstance(coupling, Plan) else len(coupling)


def leave_parents(prepared: Prepared) -> Aligned:
    """Take the networks as they are; of other widths the first units, with zeros where there are not enough."""
    parents = prepared.parents
    still = Alignment(
        {name: truncation(prepared.structure_of(name), prepared.structure) for name in parents.states},
        repr(Identity()),
        {"converged": True},
    )
    return Aligned(still, prepared.carried(still.couplings) if prepared.structures else parents.states, {})


def naive_average(prepared: Prepared, averaged: Averaged) -> Averaged:
    """Average the networks as :func:`leave_parents` has them."""
    parents, left = prepared.parents, leave_parents(prepared)
    state = average(list(left.states.values()), list(parents.shares.values()))
    return replace(
        averaged,
        model=_with_state(parents.first, state),
        structure=prepared.structure,
        alignment=left.alignment,
        structures=prepared.structures,
    )


def _gather(networks: Any, weights: Sequence[float] | Mapping[str, float] | None, into: str | None) -> Parents:
    """Name the networks, and check that they can be averaged."""
    states = named_states(networks)
    names = list(states)
    if len(names) < 2:
        raise UsageError(f"fusing needs two networks or more; got {len(names)}")
    given = networks.values() if isinstance(networks, Mapping) else networks
    modules = {name: bare(network) for name, network in zip(names, given, strict=True)}
    shares = normalise_weights(_by_name(weights, names), len(names))
    if into is not None and into not in names:
        raise UsageError(f"into is {into!r}, which is no network; give one of {', '.join(names)}")
    match_keys(states)
    for name, state in states.items():
        validate_finite(state, name)
    return Parents(modules, states, dict(zip(names, shares, strict=True)), into or names[0])


def _other_widths(
    parents: Parents, structure: Structure, capture: Callable[[nn.Module], Structure]
) -> dict[str, Structure]:
    """Capture the networks whose shapes are other ones; they must correspond to the one whose structure is given."""
    found: dict[str, Structure] = {}
    wanted = _shapes(parents.states[parents.into])
    for name in (n for n, state in parents.states.items() if _shapes(state) != wanted):
        try:
            found[name] = capture(parents.modules[name])
            require_correspondence(structure, found[name], (parents.into, name))
        except WidthError:
            raise
        except (AlignmentError, ModelError):
            match_states({n: parents.states[n] for n in (parents.into, name)})  # says what differs
            raise
    return found


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _prove(prepared: Prepared) -> str:
    """Renumber every parent at random; its output must stay."""
    results = [
        run_check(module, prepared.example_input, prepared.structure_of(name), seed=prepared.seed)
        for name, module in prepared.parents.modules.items()
    ]
    return str(max(results, key=lambda result: result.error))


def _by_name(weights: Sequence[float] | Mapping[str, float] | None, names: Sequence[str]) -> Sequence[float] | None:
    if not isinstance(weights, Mapping):
        return weights
    unknown = sorted(set(weights) ^ set(names))
    if unknown:
        raise UsageError(
            f"weights and networks differ in {unknown[0]!r}; give one weight for each of {', '.join(names)}"
        )
    return [weights[name] for name in names]


def _equivalences(
    prepared: Prepared, alignment: Alignment, moved: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, float]:
    """The proof on the alignment itself: every parent that went along permutations still answers as it did."""
    errors = {}
    for name, module in prepared.parents.modules.items():
        if alignment.soft[name]:
            continue
        generator = torch.Generator().manual_seed(prepared.seed)
        referee = Referee(module, prepared.example_input, generator, prepared.structure.outputs)
        error = referee.error({k: t.to("cpu", referee.state[k].dtype) for k, t in moved[name].items()})
        if not error <= referee.tolerance:
            raise StructureError(
                f"{type(module).__name__}: its transport changed the output by {error:.1e} "
                f"(relative, {referee.tolerance:.0e} allowed); nothing was averaged: capture its own structure"
            )
        errors[name] = error
    return errors


def _with_state(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(module)
    load_into(model, state, "fused")
    return model


class Clock:
    """Seconds of every step; says on stderr what is going on if asked to."""

    def __init__(self, progress: bool) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        if self._progress:
            from rich.console import Console

            with Console(stderr=True).status(f"{name} ..."):
                yield
        else:
            yield
        self.seconds[name] = round(time.perf_counter() - start, 4)
        logger.info("%s: %.2f s", name, self.seconds[name])
