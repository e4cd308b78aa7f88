"""Fold: one network into a narrower one of its architecture."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weldnet._arrays import find_device
from weldnet._modules import bare, home, placed
from weldnet.alignment import fold_couplings, transport
from weldnet.checkpoints import load_into, match_keys, validate_finite
from weldnet.structure import capture, require_correspondence
from weldnet.structure import check as run_check

__all__ = ["fold"]


def fold(
    model: nn.Module,
    into: nn.Module,
    example_input: Any,
    *,
    outputs: str | Sequence[str] | None = None,
    check: bool = True,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> nn.Module:
    """Fold a network into a narrower one of the same architecture, without data.

    From the input to the output, every space's units are grouped (k-means on their incoming weights, each unit counting
    by the norm of its outgoing ones). A narrow unit is the mean of its group's units; what the next layer reads is the
    sum of what it read from them. Units that are copies of one another come together with no change of the function.

    Args:
        model: the network; not changed.
        into: a network of the wanted widths; not changed, and its weights do not matter.
        example_input: what both take.
        outputs: what counts as output, as for :func:`weldnet.capture`.
        check: prove the structure on the network first.
        seed: of the groups' starts.
        device: where to compute; where ``into`` lies if None. Groups are found, and the structure proven, on the CPU.

    Returns:
        A network of ``into``'s class and widths, on its device.

    Raises:
        UsageError: there is no such device.
        CheckpointError: other tensors, or NaN or Inf in the weights.
        AlignmentError: the two differ in more than the widths of spaces.
        WidthError: a space with blocks has other widths; or one is wider than the network's.
        StructureError: renumbering would change the network's function.

    Example:
        >>> import torch, weldnet
        >>> make = lambda w: torch.nn.Sequential(torch.nn.Linear(4, w), torch.nn.ReLU(), torch.nn.Linear(w, 3))
        >>> weldnet.fold(make(12), make(8), torch.zeros(1, 4))[0].out_features
        8
    """
    narrow = bare(into)
    wide = placed(bare(model), find_device(device) or home(narrow))
    state = {k: t for k, t in wide.state_dict().items() if isinstance(t, Tensor)}
    match_keys({"model": state, "into": narrow.state_dict()})
    validate_finite(state, "model")
    structure, target = capture(wide, example_input, outputs), capture(narrow, example_input, outputs)
    require_correspondence(structure, target, ("model", "into"))
    if check:
        run_check(wide, example_input, structure, seed=seed)
    with torch.no_grad():
        couplings = fold_couplings(state, structure, target, seed=seed)
        folded = copy.deepcopy(narrow)
        load_into(folded, transport(state, structure, couplings, target), "folded")
    return folded
