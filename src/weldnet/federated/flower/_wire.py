"""What goes over the wire: state dicts as Flower's array records, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

__all__ = ["to_record", "to_state"]

_AS_INTEGERS = {torch.bfloat16: torch.int16}
"""Types that NumPy does not have, and what their bits travel as."""


def to_record(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Pack tensors, of any type, bit for bit.

    NumPy has no bfloat16: its bits travel as int16, and the array says what it is.

    >>> import torch
    >>> state = {"w": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}
    >>> {name: tensor.dtype for name, tensor in to_state(to_record(state)).items()}
    {'w': torch.bfloat16, 'n': torch.int64}
    """
    return ArrayRecord({name: _pack(tensor) for name, tensor in state.items()})


def to_state(record: ArrayRecord) -> dict[str, Tensor]:
    """Unpack what :func:`to_record` packed, or what any other Flower app sent."""
    return {name: _unpack(array) for name, array in record.items()}


def _pack(tensor: Tensor) -> Array:
    tensor = tensor.detach().cpu()
    bits = _AS_INTEGERS.get(tensor.dtype)
    if bits is None:
        return Array.from_numpy_ndarray(tensor.numpy())
    packed = Array.from_numpy_ndarray(tensor.view(bits).numpy())
    return Array(str(tensor.dtype).removeprefix("torch."), packed.shape, packed.stype, packed.data)


def _unpack(array: Array) -> Tensor:
    values = np.array(array.numpy())  # a copy that may be written to
    dtype = getattr(torch, array.dtype, None)
    tensor = torch.from_numpy(values)
    return tensor.view(dtype) if dtype in _AS_INTEGERS else tensor
