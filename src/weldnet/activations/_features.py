"""Features: what the units of a space do on unlabelled inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from weldnet._arrays import send
from weldnet._modules import evaluation_mode, explained, fast_layout, home
from weldnet.activations._inputs import Inputs, unlabelled_batches
from weldnet.activations._layers import Layer, find_layers, observed
from weldnet.assignment import Coupling, Permutation
from weldnet.structure import Place, Structure

__all__ = ["Observer", "Site", "carry_channels", "run"]

#: A layer's name, and ``"input"`` or ``"output"``.
Site = tuple[str, str]


def run(network: nn.Module, inputs: Tensor) -> object:
    """Run a network on one batch of unlabelled inputs, in eval mode and without gradients; it stays as it was.

    Raises:
        DataError: the network rejects the inputs; the message gives their shape.
        ModelError: the network holds tensors on another device.
    """
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    with explained(network, f"unlabelled inputs of shape {tuple(inputs.shape)}"), evaluation_mode(network):
        return network(send(inputs, home(network), dtype if inputs.is_floating_point() else None, copy=True))


@final
@dataclass(frozen=True)
class Observer:
    """Networks beside one another on the same unlabelled inputs.

    Args:
        networks: by name; not changed.
        structures: of each network, by name.
        choose: which layers to look at; all by default.
    """

    networks: Mapping[str, nn.Module]
    structures: Mapping[str, Structure]
    choose: Callable[[Layer], bool] = lambda layer: True

    def batches(self, data: Inputs, *, samples: int, batch_size: int = 128) -> Iterator[dict[str, dict[str, Tensor]]]:
        """Yield, batch by batch, each network's outputs by layer: ``{network: {layer: (rows, channels)}}``.

        Rows lie where their network does.

        A layer that is called several times gives its rows one call after the other. Networks see the same inputs, so
        that rows of one layer belong together.
        """
        layers = {
            n: [x for x in find_layers(m, self.structures[n]) if self.choose(x)] for n, m in self.networks.items()
        }
        for inputs in self._inputs(data, samples, batch_size):
            yield {name: _observe(network, layers[name], inputs) for name, network in self.networks.items()}

    def sites(self, data: Inputs, *, samples: int, batch_size: int = 128) -> Iterator[dict[str, dict[Site, Tensor]]]:
        """Yield, batch by batch, all that shows units: what layers give, and what linear layers and convolutions read.

        As :meth:`batches`, by layer and side: ``{network: {("conv1", "output"): (rows, channels)}}``.
        """
        places = {name: self.places(name) for name in self.networks}
        layers = {
            n: [x for x in find_layers(m, self.structures[n]) if self.choose(x)] for n, m in self.networks.items()
        }
        for inputs in self._inputs(data, samples, batch_size):
            yield {n: _observe_sites(m, layers[n], places[n], inputs) for n, m in self.networks.items()}

    def _inputs(self, data: Inputs, samples: int, batch_size: int) -> Iterator[Tensor]:
        layout: torch.memory_format | None = None
        first = home(next(iter(self.networks.values())))
        for inputs in unlabelled_batches(data, samples=samples, batch_size=batch_size):
            layout = layout or fast_layout(self.networks.values(), inputs)
            # Sent once, for all networks that are there.
            yield send(inputs, first).contiguous(memory_format=layout)

    def places(self, name: str) -> dict[Site, tuple[Place, ...]]:
        """Return where the units lie among the channels of every site that shows some, for one network."""
        layers = [x for x in find_layers(self.networks[name], self.structures[name]) if self.choose(x)]
        found: dict[Site, tuple[Place, ...]] = {(x.name, "output"): x.places for x in layers}
        found |= {(x.name, "input"): x.in_places for x in layers}
        return {site: places for site, places in found.items() if places}


def _observe_sites(
    network: nn.Module, layers: Sequence[Layer], places: Mapping[Site, object], inputs: Tensor
) -> dict[Site, Tensor]:
    seen: dict[Site, list[Tensor]] = {}

    def visit(layer: Layer, given: Tensor, output: Tensor) -> None:
        for site, values in (((layer.name, "input"), given), ((layer.name, "output"), output)):
            if site in places:
                seen.setdefault(site, []).append(layer.rows(values.detach()))

    with observed(network, layers, visit):
        run(network, inputs)
    return {site: rows[0] if len(rows) == 1 else torch.cat(rows) for site, rows in seen.items()}


def _observe(network: nn.Module, layers: Sequence[Layer], inputs: Tensor) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {}

    def visit(layer: Layer, given: Tensor, output: Tensor) -> None:
        seen.setdefault(layer.name, []).append(layer.rows(output.detach()))

    with ExitStack() as stack:
        stack.enter_context(observed(network, layers, visit))
        run(network, inputs)
    return {name: rows[0] if len(rows) == 1 else torch.cat(rows) for name, rows in seen.items()}


def carry_channels(
    rows: Tensor,
    places: Sequence[Place],
    structure: Structure,
    couplings: Mapping[str, Coupling],
    target: tuple[Sequence[Place], Structure, int] | None = None,
) -> Tensor:
    """Carry the channels of one network's outputs to the universe.

    Args:
        rows: shape (rows, channels); not changed.
        places: where the units lie among the channels, as :attr:`Layer.places` gives them.
        structure: of that network.
        couplings: of that network, by space; spaces left out stay. A unit of the universe gets the mean of the units
            that a soft coupling brings to it.
        target: for networks of other widths, the same layer's places, structure and number of channels in the universe.

    Returns:
        Shape (rows, channels of the universe).
    """
    ends, end_structure, channels = target or (places, structure, rows.shape[1])
    moved = rows.clone() if channels == rows.shape[1] else rows.new_zeros(len(rows), channels)
    if channels != rows.shape[1]:
        moved[:, _fixed(ends, end_structure, channels)] = rows[:, _fixed(places, structure, rows.shape[1])]
    for place, end in zip(places, ends, strict=True):
        coupling = couplings.get(place.space)
        if coupling is None:
            continue
        source = torch.as_tensor(structure.positions(place), device=rows.device)
        goal = torch.as_tensor(end_structure.positions(end), device=rows.device)
        if isinstance(coupling, Permutation):
            moved[:, goal] = rows[:, source[coupling.source.to(rows.device)]]
            continue
        plan = coupling.matrix(rows.dtype).to(rows.device)
        shares = plan / plan.sum(0).clamp_min(torch.finfo(plan.dtype).tiny)
        moved[:, goal] = torch.einsum("rac,au->ruc", rows[:, source], shares)
    return moved


def _fixed(places: Sequence[Place], structure: Structure, channels: int) -> Tensor:
    """The channels that lie in no space: there are as many at every width."""
    free = torch.ones(channels, dtype=torch.bool)
    for place in places:
        free[torch.as_tensor(structure.positions(place)).flatten()] = False
    return free.nonzero().flatten()
