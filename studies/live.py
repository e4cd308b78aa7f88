"""Networks with live activations: random weights of a sensible size, norms with statistics of real activations.

A network straight from its constructor hides mistakes: biases are zero, batch norms are the identity, layer scales are
1e-6. A renumbering that forgets them would go unnoticed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree
from zoo import Entry

__all__ = ["enliven", "live"]


def live(entry: Entry, seed: int = 0) -> tuple[nn.Module, Any]:
    """Build an entry of the zoo in float64 and eval mode, with live activations, and its example input."""
    torch.manual_seed(seed)
    model, example = entry.build(), entry.example()
    return enliven(model, example, seed), in_double(example)


def in_double(example: Any) -> Any:
    """Return the same input with floating-point tensors in float64."""
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, example)


def enliven(model: nn.Module, example: Any, seed: int = 0) -> nn.Module:
    """Give every parameter random values, and batch norms the statistics of the resulting activations.

    Args:
        model: changed in place; float64 and in eval mode afterwards.
        example: what the model takes.
        seed: of the values.

    Returns:
        The model.
    """
    generator = torch.Generator().manual_seed(seed + 100)
    scales = {id(p) for module in model.modules() if "Norm" in type(module).__name__ for p in _scales(module)}
    model.double().eval()
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        fan = math.prod(parameter.shape[1:]) if parameter.dim() > 1 else 4
        values = 1 + 0.3 * noise if id(parameter) in scales else noise * (1.5 / math.sqrt(fan))
        parameter.data.copy_(values)
    _calibrate(model, in_double(example), generator)
    return model


def _scales(module: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in module.named_parameters(recurse=False) if name == "weight" and p.dim() == 1]


def _calibrate(model: nn.Module, example: Any, generator: torch.Generator) -> None:
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0

    def several(t: Tensor) -> Tensor:  # a batch norm after global pooling has one value a channel and image
        more = torch.randn(3, *t.shape[1:], generator=generator, dtype=torch.float64)
        return torch.cat([t, more.to(t.dtype)]) if t.is_floating_point() else t

    batch = pytree.tree_map_only(Tensor, several, example)
    with torch.no_grad():
        call(model, batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def call(model: nn.Module, example: Any) -> Any:
    """Call a model on a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)
