"""Layers: the modules of a network whose output channels are units, and how to read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, final

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd  # pyright: ignore[reportPrivateUsage]

from weldnet.structure import Place, Structure, axes_in_view

__all__ = ["Layer", "find_layers", "observed"]

Kind = Literal["affine", "norm", "table"]


@final
@dataclass(frozen=True)
class Layer:
    """A module whose output channels are units: an affine map, a norm with channels, or a table of embeddings.

    Args:
        name: path of the module, such as ``"features.0"``; empty for the network itself.
        kind: ``"affine"`` (linear, convolution), ``"norm"`` (batch, instance, group, layer norm) or ``"table"``.
        weight: state dict key of the tensor whose output axis the channels are; None for norms without tensors.
        bias: state dict key of the bias, or None.
        channels: number of output channels.
        dim: the dimension of the output, and of an affine layer's input, that counts the channels.
        places: the places on that axis; empty where the output keeps its order (the network's own output, say).
        in_places: of an affine layer, the places of ``weight`` on its input channels.
    """

    name: str
    kind: Kind
    weight: str | None
    bias: str | None
    channels: int
    dim: int
    places: tuple[Place, ...]
    in_places: tuple[Place, ...] = ()

    def rows(self, values: Tensor) -> Tensor:
        """Return an output, or an affine layer's input, as one row a sample and position: shape (rows, channels)."""
        last = values.movedim(self.dim, -1)
        return last.reshape(-1, last.shape[-1])


@dataclass(frozen=True)
class _Reading:
    kind: Kind
    dim: int
    out_axis: int
    in_axis: int | None = None


def find_layers(model: nn.Module, structure: Structure) -> tuple[Layer, ...]:
    """Return the layers of a network, in the order of its modules.

    Args:
        model: the network, or another one of its architecture.
        structure: its structure.
    """
    names = set(structure.shapes)
    found = []
    for path, module in model.named_modules():
        reading = _read(module)
        if reading is None:
            continue
        keys = [f"{path}.{key}" if path else key for key in ("weight", "bias", "running_mean")]
        weight, bias, mean = (key if key in names else None for key in keys)
        holder = weight or mean
        if reading.kind != "norm" and weight is None:
            continue  # its parameters are made by something else (weight norm, say)
        places = _on_axis(structure, holder, reading.out_axis) if holder else ()
        reads = _reads(structure, holder, reading.in_axis) if holder and reading.in_axis is not None else ()
        found.append(Layer(path, reading.kind, weight, bias, _channels(module), reading.dim, places, reads))
    return tuple(found)


def _read(module: nn.Module) -> _Reading | None:
    """Say how a kind of module lays out its output; None for modules without channels of their own."""
    if isinstance(module, nn.Linear):
        return _Reading("affine", -1, 0, 1)
    if isinstance(module, _ConvNd):
        # With groups, the output channels of a transposed convolution lie on two axes of its weight.
        transposed = isinstance(module, _ConvTransposeNd)
        if transposed and module.groups > 1:
            return None
        return _Reading("affine", -1 - len(module.kernel_size), *((1, 0) if transposed else (0, 1)))
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int):  # of transformers
        return _Reading("affine", -1, 1, 0)
    if isinstance(module, nn.Embedding):
        return _Reading("table", -1, 1)
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return _Reading("norm", -1, 0)
    if isinstance(module, _NormBase | nn.GroupNorm):
        return _Reading("norm", 1, 0)
    return None


def _channels(module: nn.Module) -> int:
    for name in ("out_features", "out_channels", "num_features", "num_channels", "embedding_dim", "nf"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    shape = module.normalized_shape
    assert isinstance(shape, tuple)
    return int(shape[0])


def _on_axis(structure: Structure, tensor: str, axis: int) -> tuple[Place, ...]:
    shape = structure.shapes[tensor]
    plain = Place(tensor, "", (axis,))
    return tuple(
        place
        for place in structure.places_in(tensor)
        if place.axes == ((axis,) if place.view is None else axes_in_view(shape, plain, place.view))
    )


def _reads(structure: Structure, tensor: str, axis: int) -> tuple[Place, ...]:
    """The places on the input channels; with groups they lie on the axis of the groups and the one of the inputs."""
    shape = structure.shapes[tensor]
    plain = Place(tensor, "", (axis,))

    def reads(place: Place) -> bool:
        if place.view is None:
            return place.axes == (axis,)
        return set(axes_in_view(shape, plain, place.view)) <= set(place.axes)

    return tuple(place for place in structure.places_in(tensor) if reads(place))


#: What is done with a layer's input and output, each time that it is called.
Visit = Callable[[Layer, Tensor, Tensor], Any]


@contextmanager
def observed(model: nn.Module, layers: Sequence[Layer], visit: Visit) -> Iterator[None]:
    """Call ``visit(layer, input, output)`` whenever a layer of a network is called.

    What ``visit`` returns takes the place of the output, unless it is None.
    """
    modules = dict(model.named_modules())
    handles = []
    try:
        for layer in layers:

            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Any, out: Any, layer: Layer = layer) -> Any:
                given = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
                return visit(layer, given, out) if given is not None and isinstance(out, Tensor) else None

            handles.append(modules[layer.name].register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
