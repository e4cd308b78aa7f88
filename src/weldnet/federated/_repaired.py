"""Repairs on the server: what averaging broke, mended before the next round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from weldnet._modules import placed
from weldnet.alignment import Alignment
from weldnet.assignment import Permutation
from weldnet.federated._rule import Combined, Setting
from weldnet.federated._update import ClientUpdate
from weldnet.fusion import Averaged, Repair, make_repair

__all__ = ["repaired"]


def repaired(
    repair: str | Repair, combined: Combined, updates: Sequence[ClientUpdate], setting: Setting
) -> dict[str, Tensor]:
    """Return the clients' mean after a repair of :mod:`weldnet.fusion`.

    All clients that are in the mean are in memory at once.

    Args:
        repair: a name from :data:`weldnet.fusion.REPAIRS` or a repair.
        combined: the mean, and who went where.
        updates: those that the mean is of, and perhaps others.
        setting: the reference, the model and the server's unlabelled inputs.
    """
    blueprint = setting.blueprint
    structure = blueprint.structure
    states: dict[str, Mapping[str, Tensor]] = {u.client: dict(u.state) for u in updates if u.client in combined.shares}
    own = {c: blueprint.structure_of(s, setting.reference, any_width=True) for c, s in states.items()}
    still = {space.name: Permutation.identity(space.size) for space in structure.spaces}

    def network(state: Mapping[str, Tensor]) -> nn.Module:
        return placed(blueprint.module(state), setting.device)

    averaged = Averaged(
        network(combined.state),
        {client: network(state) for client, state in states.items()},
        combined.shares,
        structure,
        Alignment({client: combined.couplings.get(client) or still for client in states}),
        structures={client: found for client, found in own.items() if found is not structure},
        example_input=blueprint.example_input,
        seed=setting.seed,
    )
    state = make_repair(repair, averaged.model)(averaged, setting.data).model.state_dict()
    return {name: state[name].detach().to(tensor) for name, tensor in combined.state.items()}
