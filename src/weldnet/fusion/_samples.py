"""The unlabelled inputs that a repair works on."""

from __future__ import annotations

import torch
from torch import Tensor

from weldnet._arrays import send
from weldnet._modules import fast_layout, home
from weldnet.activations import Inputs, unlabelled_batches
from weldnet.errors import DataError
from weldnet.fusion._averaged import Averaged

__all__ = ["gather", "refuse_labels", "split"]


def gather(
    name: str, averaged: Averaged, data: Inputs | None, samples: int, batch_size: int
) -> tuple[list[Tensor], int]:
    """Return the first unlabelled inputs as batches that every pass sees in the same order, and their number.

    They are sent to the network's device once, for all passes.

    Args:
        name: of the repair, for messages.
        averaged: what is repaired.
        data: unlabelled inputs.
        samples: inputs to use at most.
        batch_size: inputs a batch, for data that does not come in batches.

    Raises:
        DataError: no data, a single input, batches that are not tensors, or integers where the network takes numbers.
    """
    if data is None:
        raise DataError(f"repair {name!r} needs unlabelled inputs; give data=, or repair='none'")
    where = home(averaged.model)
    batches = [send(x, where) for x in unlabelled_batches(data, samples=samples, batch_size=batch_size)]
    count = sum(map(len, batches))
    if count < 2:
        raise DataError("there is only one unlabelled input and a deviation needs two; give more data")
    refuse_labels(averaged.example_input, batches[0])
    layout = fast_layout([averaged.model, *averaged.parents.values()], batches[0])
    return [batch.contiguous(memory_format=layout) for batch in batches], count


def refuse_labels(example: object, inputs: Tensor) -> None:
    """Raise DataError for integers where the network's example input is floating: labels, most likely."""
    if not isinstance(example, Tensor) or not example.is_floating_point() or inputs.is_floating_point():
        return
    kind = str(inputs.dtype).removeprefix("torch.")
    raise DataError(
        f"the unlabelled data holds {kind} values of shape {tuple(inputs.shape)} and the network takes "
        f"{str(example.dtype).removeprefix('torch.')}: are they labels? give inputs, or (inputs, labels) pairs"
    )


def split(batches: list[Tensor], every: int = 4) -> tuple[list[Tensor], list[Tensor]]:
    """Hold back every fourth input, counted over all batches: what is fitted on, and what is held back."""
    fitted: list[Tensor] = []
    held: list[Tensor] = []
    start = 0
    for batch in batches:
        back = (torch.arange(start, start + len(batch)) % every == every - 1).to(batch.device)
        fitted += [batch[~back]] if bool((~back).any()) else []
        held += [batch[back]] if bool(back.any()) else []
        start += len(batch)
    return fitted, held
