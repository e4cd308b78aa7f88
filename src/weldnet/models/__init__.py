"""Reference networks at any width, in pure PyTorch.

Every factory takes its initial weights from PyTorch's random generator and nothing else: a seed decides them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from torch import nn

from weldnet.errors import UsageError
from weldnet.models._lenet import LeNet, lenet
from weldnet.models._mlp import MLP, mlp
from weldnet.models._resnet import ResNet, resnet18, resnet20, resnet50
from weldnet.models._simple_cnn import SimpleCNN, simple_cnn
from weldnet.models._vgg import VGG, vgg11, vgg13, vgg16

__all__ = [
    "MLP",
    "MODELS",
    "VGG",
    "LeNet",
    "ResNet",
    "SimpleCNN",
    "build",
    "lenet",
    "mlp",
    "resnet18",
    "resnet20",
    "resnet50",
    "simple_cnn",
    "vgg11",
    "vgg13",
    "vgg16",
]

MODELS: MappingProxyType[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        factory.__name__: factory
        for factory in (mlp, lenet, simple_cnn, vgg11, vgg13, vgg16, resnet18, resnet20, resnet50)
    }
)
"""Every reference network's factory by name."""


def build(name: str, **options: Any) -> nn.Module:
    """Build a reference network by name.

    Args:
        name: a key of `MODELS`.
        **options: keyword arguments of that factory.

    Returns:
        The network, freshly initialised from PyTorch's random generator.

    Raises:
        UsageError: if the name or an option is unknown, or an option's value makes no network.

    >>> build("mlp", sizes=(4, 3, 2))(__import__("torch").zeros(5, 4)).shape
    torch.Size([5, 2])
    """
    if name not in MODELS:
        raise UsageError(f"unknown model {name!r}; known models: {', '.join(MODELS)}")
    factory = MODELS[name]
    known = inspect.signature(factory).parameters
    unknown = [option for option in options if option not in known]
    if unknown:
        raise UsageError(f"model {name!r} has no option {unknown[0]!r}; its options: {', '.join(known)}")
    try:
        return factory(**options)
    except (TypeError, ValueError, RuntimeError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise UsageError(f"model {name!r} cannot be built with {given}: {error}") from error
