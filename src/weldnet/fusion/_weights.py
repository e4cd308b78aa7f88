"""Norms: the repair that needs no inputs at all."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import final

import torch

from weldnet.activations import Inputs, find_layers
from weldnet.alignment import transport
from weldnet.fusion._affine import read_matrix, write_matrix
from weldnet.fusion._averaged import Averaged, Repaired

__all__ = ["WeightNorms"]


@final
@dataclass(frozen=True)
class WeightNorms:
    """Give every unit's incoming weights the norm that its parents' have on average.

    Averaging weights that agree only in part shortens them. Every affine layer's weights are scaled, unit by unit, to
    the mean, by shares, of the norms of the units that were averaged: for inputs that are uncorrelated and as large as
    the parents', that restores the variance, also the one that a BatchNorm's averaged statistics expect. A parent
    without a unit, or whose unit has no incoming weights, does not count there. Biases and statistics stay. Layers that
    share their weight with another module are left out.

    It takes no inputs, and looks at none that are given.
    """

    def __call__(self, averaged: Averaged, data: Inputs | None, /) -> Repaired:
        """Return a scaled copy."""
        model = copy.deepcopy(averaged.model)
        modules = dict(model.named_modules())
        moved = {}
        for name, parent in averaged.parents.items():
            structure = averaged.structures.get(name, averaged.structure)
            couplings = averaged.alignment.couplings.get(name, {})
            moved[name] = transport(parent.state_dict(), structure, couplings, averaged.structure)
        scaled = 0
        for layer in find_layers(model, averaged.structure):
            if layer.kind != "affine" or layer.weight is None or layer.weight in averaged.structure.aliases.values():
                continue
            module = modules[layer.name]
            norms = []
            for name, share in averaged.shares.items():
                twin = copy.deepcopy(module)
                with torch.no_grad():
                    twin.get_parameter("weight").copy_(moved[name][layer.weight])
                norms.append((share, read_matrix(twin).double().norm(dim=1)))
            matrix = read_matrix(module).double()
            own = matrix.norm(dim=1)
            wanted = sum((share * norm for share, norm in norms), torch.zeros_like(own))
            have = sum((share * (norm > 0) for share, norm in norms), torch.zeros_like(own))
            scale = torch.where((own > 0) & (have > 0), wanted / (have * own), torch.ones_like(own))
            # Norms that differ by rounding alone are equal.
            scale = torch.where((scale - 1).abs() < 1e-6, torch.ones_like(scale), scale)
            write_matrix(module, matrix * scale.unsqueeze(1))
            scaled += 1
        return Repaired(model, f"weights: the units of {scaled} layers given their parents' mean norm")
