"""Modules as users bring them: wrappers come off, and what cannot be renumbered as it is, is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from weldnet.errors import CaptureError, DataError, ModelError, UsageError

__all__ = [
    "bare",
    "bring",
    "evaluation_mode",
    "explained",
    "fast_layout",
    "forget_cached",
    "home",
    "no_module",
    "placed",
]


def bare(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``.

    Args:
        model: not changed; the result is (part of) this very object.

    Raises:
        UsageError: it is no module; the message says what to do with a state dict.
        CaptureError: the module is TorchScript, quantised, sparse or not yet initialised; the message says what to do.
    """
    if not isinstance(model, nn.Module):  # typed, but users' code is not
        raise UsageError(no_module(model))
    inner = getattr(model, "_orig_mod", None)
    if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = model.module
    if isinstance(inner, nn.Module):
        return bare(inner)
    for name, module in model.named_modules():
        where = f"{type(model).__name__}: {name!r}" if name else type(model).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{where} is TorchScript, whose operations cannot be seen; give the Python module that it was made "
                "from, with its state dict loaded"
            )
        if hasattr(module, "_packed_params") or "quantized" in type(module).__module__:
            raise CaptureError(
                f"{where} is quantised, and its integers cannot be averaged; fuse the floating-point networks and "
                "quantise the result"
            )
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            _refuse_tensor(model, name, tensor)
    return model


def home(model: nn.Module) -> torch.device:
    """Return where a network lies, by its first parameter; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def placed(model: nn.Module, device: torch.device | None) -> nn.Module:
    """Return a network on a device: the very one if it lies there or there is no device, else a copy."""
    return model if device is None or device == home(model) else bring(copy.deepcopy(model), device)


def bring(model: nn.Module, device: torch.device) -> nn.Module:
    """Bring a network of one's own to a device, in place.

    As ``Module.to`` does, and with it what modules hold as plain attributes: tensors that are no buffers, and a device
    on which a forward pass makes tensors.
    """
    if device == home(model):
        return model
    for module in model.to(device).modules():
        held = vars(module)
        held.update({name: value.to(device) for name, value in held.items() if isinstance(value, Tensor)})
        held.update({name: device for name, value in held.items() if isinstance(value, torch.device)})
    return model


def no_module(model: object) -> str:
    """Say what to give instead of something that is no network."""
    kind = type(model).__name__
    if isinstance(model, Mapping):
        return (
            f"a {kind} is given as the network, and a state dict has no forward pass; build the nn.Module and load it"
        )
    return f"a {kind} is given as the network; give an nn.Module with its weights loaded"


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients; give every module its training flag back after."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def explained(model: nn.Module, given: str) -> Iterator[None]:
    """Say of what a forward pass refuses why: it does not fit the model, or the model does not lie on one device.

    Args:
        model: what is run inside.
        given: what it is run on, in the plural and with its shape.

    Raises:
        DataError: what is given does not fit.
        ModelError: the model holds tensors on another device.
    """
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError that says nothing of the inputs
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        kind, reason = type(model).__name__, str(error).partition("\n")[0]
        if "same device" in reason:
            raise ModelError(
                f"{kind} lies on {home(model)} and holds tensors elsewhere ({reason}); register them as buffers, or "
                "give device='cpu'"
            ) from error
        name, weight = next(iter(model.named_parameters()), ("", torch.empty(0)))
        raise DataError(
            f"{given} do not fit {kind}, whose first weight {name!r} has shape {tuple(weight.shape)}; give the model "
            f"or the data that belong together ({reason})"
        ) from error


def fast_layout(networks: Iterable[nn.Module], inputs: Tensor) -> torch.memory_format:
    """Return the memory layout in which networks run fastest: channels last for pictures, if all of them take it.

    Networks of convolutions and pooling are 1.3 to 2.3 times as fast so on CPUs. A network that calls ``view`` on what
    they give cannot take it, which is found by running each network on one input, twice in a batch, in eval mode; they
    stay as they were.

    Args:
        networks: what will be run.
        inputs: on what, shape (N, ...); moved to each network's device and precision.

    Returns:
        ``torch.contiguous_format`` also where there are no pictures.
    """
    if inputs.dim() != 4 or not inputs.is_floating_point() or not len(inputs):
        return torch.contiguous_format
    two = torch.cat([inputs[:1], inputs[:1]])  # with a single one every view of the batch is allowed
    for network in networks:
        like = next((p for p in network.parameters() if p.is_floating_point()), inputs)
        try:
            with evaluation_mode(network):
                network(two.to(like.device, like.dtype, copy=True, memory_format=torch.channels_last))
        except Exception:  # what is wrong with a batch of real inputs, the pass on one will say
            return torch.contiguous_format
    return torch.channels_last


def forget_cached(model: nn.Module) -> None:
    """Drop what a model has kept of its weights from a pass in eval mode; the mode of every module stays.

    Some models compute tables from their weights once, in the first pass in eval mode, and drop them in ``train()``.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, training in modes:
        module.training = training


def _refuse_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    where = f"{type(model).__name__}: {name!r}"
    if is_lazy(tensor):
        raise CaptureError(f"{where} is not initialised; run the model once on an example input")
    if tensor.is_quantized:
        raise CaptureError(f"{where} is quantised; give the floating-point network")
    if tensor.layout != torch.strided:
        raise CaptureError(f"{where} is sparse, and renumbering needs dense tensors; replace it by its .to_dense()")
