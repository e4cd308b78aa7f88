"""Rules that match units before they average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, final

import torch

from weldnet._modules import placed
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
    joint, in the order of the first client by name that has the server's widths (of the reference if none has).

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
    ``w_c = sum_k n_kc w_kc / sum_k n_kc``; where nobody has the class, by ``weighting``.

    With ``layers`` a run goes the whole way of FedMA, see :class:`weldnet.federated.LayerRounds`: in every round layer
    after layer is matched, frozen, and the rest trained again. With growth too, units without a counterpart make the
    global network wider, and in the next round each client gets its own sub-network, cut out of it.

    Args:
        layers: match one layer an exchange, in runs; ``aggregate`` alone matches all at once.
        method: the matching; ``growth`` needs ``layers``.
        weighting: of everything but the last layer.
        anchor: see :class:`Matched`; layer rounds are joint.

    Source: Wang et al., "Federated Learning with Matched Averaging", https://arxiv.org/abs/2002.06440.
    """

    layers: bool = False
    method: MatchedAveraging = MatchedAveraging()  # noqa: RUF009  a frozen value
    weighting: Weighting = "examples"
    anchor: Anchor = "joint"
    any_width = False
    needs_classes = True

    def __post_init__(self) -> None:
        if not isinstance(self.layers, bool):
            raise UsageError(f"fedma: layers is {self.layers!r}; give true or false")
        if self.layers and self.anchor != "joint":
            raise UsageError(
                f"fedma: layer rounds match all clients at once, and anchor is {self.anchor!r}; give 'joint'"
            )
        if self.method.growth and not self.layers:
            raise UsageError("fedma: networks grow in layer rounds only; give layers as well as growth")
        Matched(method=replace(self.method, growth=False), weighting=self.weighting, anchor=self.anchor)

    @property
    def name(self) -> str:
        """``fedma``, with ``-layers``, ``-growth`` and ``-uniform`` where they apply."""
        name = "fedma" + ("-layers" if self.layers else "") + ("-growth" if self.method.growth else "")
        return suffixed(name, self.weighting)

    def __call__(self, screen: Screen, setting: Setting, /) -> Combined | None:
        """Match, average; the last layer by class counts."""
        method = replace(self.method, growth=False)
        return _combine(method, self.anchor, self.weighting, screen, setting, classes=True)


def align_to_reference(method: AlignmentMethod, sound: Sound, setting: Setting) -> Carried:
    """Align one client to the reference, and carry it to the reference's order."""
    found = _align(method, {_REFERENCE: None, sound.client: sound}, setting)
    return _carried(sound, found, setting)


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
        return mean_of((Carried(sound, sound.state, {}) for sound in sounds), setting, weighting, classes)
    # The universe is in the order and has the widths of the first network: the server's widths.
    sounds.sort(key=lambda sound: sound.structure is not setting.blueprint.structure)
    fits = sounds[0].structure is setting.blueprint.structure
    networks: dict[str, Sound | None] = {_REFERENCE: None} if setting.began or not fits else {}
    networks |= {sound.client: sound for sound in sounds}
    found = _align(method, networks, setting)
    return mean_of((_carried(sound, found, setting) for sound in sounds), setting, weighting, classes)


def _carried(sound: Sound, found: Alignment, setting: Setting) -> Carried:
    couplings = found[sound.client]
    state = transport(sound.state, sound.structure, couplings, setting.blueprint.structure)
    objective = found.stats.get("objective")
    value = float(objective) if isinstance(objective, float | int) else None
    return Carried(sound, state, couplings, found.moved[sound.client], value)


def _one_by_one(method: AlignmentMethod, screen: Screen, setting: Setting) -> Iterator[Carried]:
    """Align client after client to the reference; one that cannot be aligned is dropped."""
    for sound in screen:
        try:
            carried = align_to_reference(method, sound, setting)
        except UsageError:
            raise
        except WeldnetError as error:
            screen.drop(sound.client, f"not aligned: {error}")
            continue
        yield carried


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
        networks={n: placed(blueprint.module(s), setting.device) for n, s in states.items()} if watched else None,
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
