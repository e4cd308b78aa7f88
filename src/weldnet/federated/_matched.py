"""Rules that match units before they average."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from weldnet.alignment import (
    Alignment,
    AlignmentMethod,
    MatchedAveraging,
    Problem,
    describe,
    make_method,
    require_width,
    transport,
)
from weldnet.assignment import Plan
from weldnet.errors import FusionError, UsageError, WeldnetError
from weldnet.federated._rule import Carried, Combined, Setting, Weighting, check_weighting, mean_of, suffixed
from weldnet.federated._update import Screen, Sound

__all__ = ["Anchor", "FedMA", "Matched", "align_to_reference"]

Anchor = Literal["reference", "joint"]

_REFERENCE = "the server's model"


@final
@dataclass(frozen=True, kw_only=True)
class Matched:
    """Match the clients' units first, by any alignment method, then take the weighted mean.

    With the anchor ``"reference"`` every client is aligned to the server's model, on its own: memory does not grow with
    the number of clients, and units keep their numbers over the rounds. The reference itself has no weight in the mean.
    With ``"joint"`` all clients are aligned at once, together with the reference if they began from it, in whose order
    the universe then is. Where clients did not begin from the reference there is nothing to align to, and both are
    joint, in the order of the first client by name.

    Args:
        method: a name from :data:`weldnet.alignment.METHODS` or a method object.
        weighting: ``"examples"`` (a client counts by its samples) or ``"uniform"``.
        anchor: ``"reference"`` or ``"joint"``.
    """

    method: str | AlignmentMethod = "gamf"
    weighting: Weighting = "examples"
    anchor: Anchor = "reference"
    needs_classes = False

    def __post_init__(self) -> None:
        check_weighting("matched", self.weighting)
        if self.anchor not in ("reference", "joint"):
            raise UsageError(f"anchor is {self.anchor!r}; give 'reference' or 'joint'")
        object.__setattr__(self, "method", make_method(self.method))
        if isinstance(self.method, MatchedAveraging) and self.method.growth:
            raise UsageError("matched_averaging with growth makes a wider network; give the rule FedMA(growth=True)")
        if getattr(self.method, "barycentre", False) and self.anchor == "reference":
            raise UsageError(f"{describe(self.chosen)} moves the reference too; give anchor='joint'")

    @property
    def chosen(self) -> AlignmentMethod:
        """The method as an object."""
        assert not isinstance(self.method, str)
        return self.method

    @property
    def name(self) -> str:
        """The method's name, with ``-joint`` and ``-uniform`` where they apply."""
        return suffixed(self.chosen.name + ("-joint" if self.anchor == "joint" else ""), self.weighting)

    @property
    def any_width(self) -> bool:
        """Whether the method takes clients of other widths."""
        return self.chosen.any_width

    def __call__(self, screen: Screen, setting: Setting, /) -> Combined | None:
        """Align, carry, average."""
        return _combine(self.chosen, self.anchor, self.weighting, screen, setting)


@final
@dataclass(frozen=True, kw_only=True)
class FedMA:
    """Matched averaging with the last layer weighted class by class: one shot of FedMA.

    Units are matched by :class:`weldnet.MatchedAveraging`, jointly over the clients (see :class:`Matched` for the
    anchor). What belongs to an output is averaged by how many samples of that class each client has,
    ``w_c = sum_k n_kc w_kc / sum_k n_kc``; where nobody has the class, by ``weighting``. The layer rounds of FedMA,
    in which what is matched is frozen and the rest trained again, are in :class:`weldnet.federated.LayerRounds`.

    Args:
        method: the matching; its ``growth`` must be off here.
        weighting: of everything but the last layer.
        anchor: see :class:`Matched`.

    Source: Wang et al., "Federated Learning with Matched Averaging", https://arxiv.org/abs/2002.06440.
    """

    method: MatchedAveraging = MatchedAveraging()  # noqa: RUF009  a frozen value
    weighting: Weighting = "examples"
    anchor: Anchor = "joint"
    any_width = False
    needs_classes = True

    def __post_init__(self) -> None:
        Matched(method=self.method, weighting=self.weighting, anchor=self.anchor)

    @property
    def name(self) -> str:
        """``fedma``, or ``fedma-uniform``."""
        return suffixed("fedma", self.weighting)

    def __call__(self, screen: Screen, setting: Setting, /) -> Combined | None:
        """Match, average; the last layer by class counts."""
        return _combine(self.method, self.anchor, self.weighting, screen, setting, classes=True)


def align_to_reference(
    method: AlignmentMethod, sound: Sound, setting: Setting
) -> tuple[dict[str, Tensor], float, float | None]:
    """Align one client to the reference.

    Returns:
        The client's tensors in the reference's order, the share of units that moved, and the method's objective.
    """
    found = _align(method, {_REFERENCE: None, sound.client: sound}, setting)
    moved = transport(sound.state, sound.structure, found[sound.client], setting.blueprint.structure)
    return moved, found.moved[sound.client], _objective(found)


def _combine(
    method: AlignmentMethod,
    anchor: Anchor,
    weighting: Weighting,
    screen: Screen,
    setting: Setting,
    *,
    classes: bool = False,
) -> Combined | None:
    if anchor == "reference" and setting.began:
        return mean_of(_one_by_one(method, screen, setting), setting, weighting, classes)
    sounds = list(screen)
    if len(sounds) < 2:
        return mean_of(((sound, sound.state, 0.0, None) for sound in sounds), setting, weighting, classes)
    networks: dict[str, Sound | None] = {_REFERENCE: None} if setting.began else {}
    networks |= {sound.client: sound for sound in sounds}
    found = _align(method, networks, setting)
    target, objective = setting.blueprint.structure, _objective(found)
    carried = (
        (s, transport(s.state, s.structure, found[s.client], target), found.moved[s.client], objective) for s in sounds
    )
    combined = mean_of(carried, setting, weighting, classes)
    return combined and dataclasses.replace(combined, alignment=found)


def _one_by_one(method: AlignmentMethod, screen: Screen, setting: Setting) -> Iterator[Carried]:
    """Align client after client to the reference; one that cannot be aligned is dropped."""
    for sound in screen:
        try:
            state, moved, objective = align_to_reference(method, sound, setting)
        except UsageError:
            raise
        except WeldnetError as error:
            screen.drop(sound.client, f"not aligned: {error}")
            continue
        yield sound, state, moved, objective


def _align(method: AlignmentMethod, networks: Mapping[str, Sound | None], setting: Setting) -> Alignment:
    """Align networks; None stands for the reference."""
    blueprint = setting.blueprint
    states = {n: setting.reference if sound is None else sound.state for n, sound in networks.items()}
    watched = method.needs_data
    problem = Problem(
        blueprint.structure,
        states,
        seed=setting.seed,
        device=setting.device,
        networks={n: blueprint.module(state) for n, state in states.items()} if watched else None,
        data=setting.data,
        structures={n: s.structure for n, s in networks.items() if s and s.structure is not blueprint.structure},
    )
    require_width(method, problem)
    with torch.no_grad():
        found = method(problem)
    for space, coupling in next(iter(found.couplings.values())).items():
        units = coupling.values.shape[1] if isinstance(coupling, Plan) else len(coupling)
        if units != blueprint.structure.space(space).size:
            raise FusionError(f"{method.name} grows space {space!r} to {units} units; give a rule that grows networks")
    return found


def _objective(found: Alignment) -> float | None:
    value = found.stats.get("objective")
    return float(value) if isinstance(value, float | int) else None
