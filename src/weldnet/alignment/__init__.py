"""Alignment: the methods, one file each, independent of each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weldnet._arrays import find_device, state_home
from weldnet._modules import bare, placed
from weldnet.activations import Inputs
from weldnet.alignment._auto import AUTO, Choice, Situation, choose_auto
from weldnet.alignment._diagnose import Diagnosis, SpaceRow, carry_all, diagnose_states
from weldnet.alignment._folding import fold_couplings
from weldnet.alignment._method import Alignment, AlignmentMethod, Problem, require_width
from weldnet.alignment._registry import METHODS, describe, make_method, require_device, resolve
from weldnet.alignment._transport import transport, truncation
from weldnet.alignment._workspace import Workspace
from weldnet.alignment.activation_matching import ActivationMatching
from weldnet.alignment.frank_wolfe import FrankWolfe
from weldnet.alignment.gamf import Gamf
from weldnet.alignment.identity import Identity
from weldnet.alignment.matched_averaging import MatchedAveraging
from weldnet.alignment.merge_many import MergeMany
from weldnet.alignment.optimal_transport import OptimalTransport
from weldnet.alignment.sinkhorn_rebasin import SinkhornRebasin
from weldnet.alignment.straight_through import StraightThrough
from weldnet.alignment.weight_matching import WeightMatching
from weldnet.errors import UsageError
from weldnet.structure import Structure

__all__ = [
    "AUTO",
    "METHODS",
    "ActivationMatching",
    "Alignment",
    "AlignmentMethod",
    "Choice",
    "Diagnosis",
    "FrankWolfe",
    "Gamf",
    "Identity",
    "MatchedAveraging",
    "MergeMany",
    "OptimalTransport",
    "Problem",
    "SinkhornRebasin",
    "Situation",
    "SpaceRow",
    "StraightThrough",
    "WeightMatching",
    "Workspace",
    "align",
    "choose_auto",
    "describe",
    "diagnose",
    "diagnose_states",
    "fold_couplings",
    "make_method",
    "named_states",
    "require_device",
    "require_width",
    "resolve",
    "transport",
    "truncation",
]

Network = nn.Module | Mapping[str, Tensor]
Networks = Sequence[Network] | Mapping[str, Network]


def align(
    networks: Networks,
    structure: Structure,
    *,
    method: str | AlignmentMethod = "gamf",
    data: Inputs | None = None,
    structures: Mapping[str, Structure] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    **options: Any,
) -> Alignment:
    """Find who corresponds to whom in two or more networks.

    Args:
        networks: modules or state dicts, in a list (then named ``"a"``, ``"b"``, ...) or by name.
        structure: where their units lie, from :func:`weldnet.capture`.
        method: a name from :data:`METHODS`, ``"auto"``, or a method object such as ``Gamf(sigma=4.0)``.
        data: unlabelled inputs, for methods that look at activations: a tensor, a Dataset, a DataLoader or an iterable
            of batches; labels in it are ignored.
        structures: of networks whose widths are not those of ``structure``, by name; for methods that take them.
        seed: of everything random in the method.
        device: where to compute; where the first network lies if None. The couplings lie on the CPU.
        options: of the method, if it is given by name.

    Returns:
        One coupling for each network and space; the first network's are identities.

    Raises:
        UsageError: an unknown method, option or device, names that cannot be told apart, or a method that looks at
            activations without data or modules.
        AlignmentError: fewer than two networks, or tensors that do not fit the structure.
        WidthError: unequal widths, and a method that needs equal ones.

    Example:
        >>> import torch, weldnet
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> a, b = make(), make()
        >>> alignment = weldnet.align([a, b], weldnet.capture(a, torch.zeros(1, 4)), method="weight_matching")
        >>> alignment["b"]["0"].source.shape
        torch.Size([8])
    """
    states = named_states(networks)
    chosen, _ = resolve(method, has_data=data is not None, states=states.values(), **options)
    given = networks.values() if isinstance(networks, Mapping) else networks
    modules = {name: bare(n) for name, n in zip(states, given, strict=True) if isinstance(n, nn.Module)}
    target = find_device(device) or state_home(next(iter(states.values()), {}))
    require_device(chosen, target)
    if chosen.needs_data and len(modules) == len(states):  # they run where everything else is computed
        modules = {name: placed(module, target) for name, module in modules.items()}
        states = named_states(modules)
    problem = Problem(
        structure,
        states,
        seed=seed,
        device=target,
        networks=modules if len(modules) == len(states) else None,
        data=data,
        structures=structures or {},
    )
    require_width(chosen, problem)
    with torch.no_grad():
        return chosen(problem)


def diagnose(
    alignment: Alignment,
    networks: Networks,
    structure: Structure,
    *,
    structures: Mapping[str, Structure] | None = None,
) -> Diagnosis:
    """Say space by space how well an alignment matches the units of its networks.

    Soft couplings are carried too: a universe unit is then the weighted mean of a network's units.

    Args:
        alignment: who went where.
        networks: the modules or state dicts that were aligned, in a list (then named ``"a"``, ``"b"``, ...) or by name.
        structure: where their units lie, in the universe.
        structures: of the networks whose widths are others, by name, as for :func:`align`.

    Returns:
        For each space its units, the share that moved, the match quality (mean cosine of matched units' weights, with
        that before alignment beside it) and the cost; ``print`` shows the table.

    Raises:
        AlignmentError: the networks or the structure are not those of the alignment.

    Example:
        >>> import torch, weldnet
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> a, structure = make(), weldnet.capture(make(), torch.zeros(1, 4))
        >>> row = weldnet.diagnose(weldnet.align([a, a], structure), [a, a], structure).rows[0]
        >>> row.units, round(row.quality, 6), round(row.cost, 6)
        (8, 1.0, 0.0)
    """
    states = named_states(networks)
    return diagnose_states(alignment, states, structure, carry_all(alignment, states, structure, structures or {}))


def named_states(networks: Networks) -> dict[str, Mapping[str, Tensor]]:
    """Return the state dicts of networks by name; those of a list are named ``"a"``, ``"b"``, ..."""
    if not isinstance(networks, Sequence | Mapping) or isinstance(networks, str):
        raise UsageError(f"networks is a {type(networks).__name__}; give a list of networks, or a dict of them by name")
    named = networks if isinstance(networks, Mapping) else dict(zip(_letters(len(networks)), networks, strict=True))
    if isinstance(networks, nn.Module | Tensor) or any(isinstance(n, Tensor) for n in named.values()):
        raise UsageError("give a list of networks, or a dict of networks by name, not one network")
    states = {}
    for name, network in named.items():
        if not isinstance(network, nn.Module | Mapping):
            raise UsageError(f"network {name!r} is a {type(network).__name__}; give an nn.Module or its state dict")
        state = bare(network).state_dict() if isinstance(network, nn.Module) else network
        states[name] = {key: tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}
    return states


def _letters(count: int) -> list[str]:
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    return [alphabet[i] if count <= len(alphabet) else f"n{i}" for i in range(count)]
