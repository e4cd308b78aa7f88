"""From ``--data`` to labelled images, and what is said about them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weldnet.cli._common import say, stray_prints_to_stderr
from weldnet.cli._early import a_type, check_data, is_factory
from weldnet.errors import DataError, UsageError, WeldnetError

if TYPE_CHECKING:
    from torch import Tensor

    from weldnet.data import Split
    from weldnet.evaluation import Labelled

__all__ = ["SAMPLES", "load_labelled", "load_split", "load_unlabelled"]

SAMPLES = 512
"""Unlabelled inputs that commands without an option for it take."""

_RETURNS = "it must return (inputs, labels) tensors, a Dataset or a DataLoader when it is called with split='train'"


def load_labelled(source: str, split: str) -> Labelled:
    """Load labelled images to score on, and say on stderr which they are and how they are normalised.

    Args:
        source: a name or folder for `weldnet.data.load`, or the user's own ``file.py:factory``, which is called
            with ``split=`` and returns (inputs, labels) tensors, a Dataset or a DataLoader.
        split: train or test.

    Raises:
        UsageError: there is no such data, factory or split.
        DataError: the data cannot be read, or the factory fails.
    """
    _check(source, split)
    if not is_factory(source):
        return load_split(source, split)
    labelled = _call(source, split)
    say(f"data: {_described(source, labelled, split)}")
    return labelled


def load_split(source: str, split: str) -> Split:
    """Load labelled images as tensors; otherwise as `load_labelled`."""
    import torch

    from weldnet.data import Split, load, normalisation

    _check(source, split)
    if not is_factory(source):
        images = load(source, split=split)  # pyright: ignore[reportArgumentType]  (checked above)
        say(f"data: {source}, {len(images)} {split} images; pixels normalised as {normalisation(images)}")
        return images
    batches = list(_batches(_call(source, split), source))
    if not batches:
        raise DataError(f"{source}: there are no rows; give at least one image")
    inputs, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    classes = tuple(str(index) for index in range(int(labels.max()) + 1))
    images = Split(inputs, labels, classes, source)
    say(f"data: {_described(source, images, split)}")
    return images


def load_unlabelled(source: str, samples: int) -> Tensor:
    """Load so many training inputs without their labels; errors as `load_labelled`."""
    import torch

    from weldnet.data import load, normalisation

    _check(source, "train")
    if not is_factory(source):
        images = load(source, split="train", limit=samples)
        say(f"data: {source}, {len(images)} train images without labels; {normalisation(images)}")
        return images.images
    inputs: list[Tensor] = []
    for batch, _ in _batches(_call(source, "train"), source):
        inputs.append(batch[: samples - sum(map(len, inputs))])
        if sum(map(len, inputs)) >= samples:
            break
    if not inputs:
        raise DataError(f"{source}: there are no rows; give at least one image")
    say(
        f"data: {source}, {sum(map(len, inputs))} train samples without labels, as the factory gives them; "
        "weldnet normalises nothing"
    )
    return torch.cat(inputs)


def _check(source: str, split: str) -> None:
    check_data(source)
    if split not in ("train", "test"):
        raise UsageError(f"split {split!r} is unknown; choose 'train' or 'test'")


def _call(source: str, split: str) -> Any:
    from torch import Tensor
    from torch.utils.data import DataLoader, Dataset, TensorDataset

    from weldnet.cli._model import find_factory

    with stray_prints_to_stderr():
        factory = find_factory(source, option="--data")
        try:
            found = factory(split=split)
        except WeldnetError:
            raise
        except (Exception, SystemExit) as error:
            raise DataError(
                f"the data factory {source!r} raised {type(error).__name__}: {error}; {_RETURNS}"
            ) from error
    if isinstance(found, Dataset | DataLoader):
        return found
    if isinstance(found, tuple | list) and len(found) == 2 and all(isinstance(part, Tensor) for part in found):
        inputs, labels = found
        if inputs.dim() == 0 or labels.shape != inputs.shape[:1] or labels.is_floating_point():
            raise DataError(
                f"the data factory {source!r} returned inputs {tuple(inputs.shape)} and labels "
                f"{tuple(labels.shape)} {labels.dtype}; give one integer label for each input"
            )
        return TensorDataset(inputs, labels)
    raise DataError(f"the data factory {source!r} returned {a_type(found)}; {_RETURNS}")


def _batches(labelled: Any, source: str) -> Any:
    """Yield (inputs, labels) batches of a Dataset or a DataLoader."""
    from torch import Tensor
    from torch.utils.data import DataLoader, Dataset

    for batch in DataLoader(labelled, batch_size=256) if isinstance(labelled, Dataset) else labelled:
        pair = isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
        if not pair:
            raise DataError(f"{source}: a batch is {a_type(batch)}; give (inputs, labels) pairs of tensors")
        yield tuple(batch)


def _described(source: str, labelled: Any, split: str) -> str:
    try:
        count = f"{len(getattr(labelled, 'dataset', labelled))} "
    except TypeError:
        count = ""
    return f"{source}, {count}{split} samples, as the factory gives them; weldnet normalises nothing"
