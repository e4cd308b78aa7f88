"""A model with live activations: random parameters of a sensible size, and norms calibrated to them."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weldnet.errors import ModelError
from weldnet.structure._trace import call

__all__ = ["draw_floats", "draw_integers", "enliven"]


def enliven(
    model: nn.Module, example_input: Any, moved: Container[str], generator: torch.Generator, *, gain: float = 1.0
) -> None:
    """Give a model live activations, in place.

    Every parameter with more than one element is drawn anew, and of the buffers those that renumbering moves.
    Matrices and kernels have deviation gain * sqrt(2 / fan in). Vectors lie between 0.4 and 1: as biases they keep
    rectifiers alive, as scales they pass the signal on, and nothing that must be positive turns negative. Scalars, such
    as temperatures, stay. Running statistics then become those of the activations.

    Args:
        model: changed; in eval mode.
        example_input: what the model takes.
        moved: names of the tensors that renumbering moves.
        generator: of the new values.
        gain: lower for models whose activations overflow.
    """
    parameters = {id(p) for p in model.parameters()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        chosen = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel() > 1
        if chosen and (id(tensor) in parameters or name in moved):
            tensor.data.copy_(_draw(tensor, generator, gain))
    _calibrate(model, example_input, generator)


def draw_integers(model: nn.Module, example_input: Any, generator: torch.Generator) -> Any:
    """Return an input of the same shapes whose integers are drawn anew: tokens that are all alike hide attention.

    They come from the values that are there, or where all are 0 from the first few numbers that the model takes.
    """
    for limit in (8, 2, 1):
        drawn = pytree.tree_map_only(Tensor, lambda t, n=limit: _integers_like(t, n, generator), example_input)
        try:
            call(model, None, drawn)
            return drawn
        except ModelError:
            continue
    return example_input


def draw_floats(example_input: Any, generator: torch.Generator) -> Any:
    """Return an input of the same shapes with normal random numbers for its floating ones."""

    def draw(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=t.dtype) if t.is_floating_point() else t

    return pytree.tree_map_only(Tensor, draw, example_input)


def _integers_like(t: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool or not t.numel():
        return t
    pool = t.flatten() if bool(t.any()) else torch.arange(limit, dtype=t.dtype, device=t.device)
    return pool[torch.randint(len(pool), t.shape, generator=generator).to(pool.device)]


def _draw(tensor: Tensor, generator: torch.Generator, gain: float) -> Tensor:
    sizes = [n for n in tensor.shape if n > 1]
    if len(sizes) == 1:
        return 0.4 + 0.6 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    deviation = gain * math.sqrt(2 / math.prod(sizes[1:]))
    return deviation * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)


def _calibrate(model: nn.Module, example_input: Any, generator: torch.Generator) -> None:
    """Set running means and variances to those of one forward pass, each a little off so that no unit is silent."""
    norms = [m for m in model.modules() if _has_statistics(m)]
    found: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        mean = module.running_mean
        assert isinstance(mean, Tensor)
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.dim() > 1 and x.shape[1] == mean.numel():
            found[module] = _statistics(x.detach(), generator)
            _set_statistics(module, *found[module])  # what follows in this pass sees them too

    hooks = [module.register_forward_pre_hook(note) for module in norms]
    try:
        call(model, None, example_input)
    finally:
        for hook in hooks:
            hook.remove()
    for module, statistics in found.items():
        _set_statistics(module, *statistics)


def _has_statistics(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), Tensor) for name in ("running_mean", "running_var"))


def _statistics(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    rows = x.transpose(0, 1).flatten(1).double()
    share = 0.5 + 0.3 * torch.rand(len(rows), generator=generator, dtype=torch.float64)
    mean = rows.mean(1) * share
    square = (rows - mean[:, None]).square().mean(1)
    return mean, square * (1 + share) + 1e-3 * (1 + float(square.mean()))


def _set_statistics(module: nn.Module, mean: Tensor, variance: Tensor) -> None:
    for name, value in (("running_mean", mean), ("running_var", variance)):
        buffer = getattr(module, name)
        buffer.data.copy_(value.reshape(buffer.shape))
