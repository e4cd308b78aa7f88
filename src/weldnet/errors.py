"""Everything weldnet raises on purpose.

    WeldnetError
    ├── UsageError                 wrong arguments: the call itself cannot be meant
    │   └── ConfigError            a config file or one of its keys
    ├── CheckpointError            a file that cannot be read, written, or does not fit the model
    ├── DataError                  a dataset that is missing, empty or of the wrong shape
    ├── ModelError                 a factory or a forward pass that fails
    │   └── CaptureError           the forward pass cannot be traced
    ├── StructureError             the structure does not hold on this model (the check failed)
    ├── AlignmentError             networks that cannot be aligned
    │   └── WidthError             unequal widths, for a method that needs equal ones
    ├── FusionError                aligned networks that cannot be averaged or repaired
    ├── TrainingError              a training run that cannot go on
    ├── FederatedError             a federated run that cannot go on
    └── RecordError                records of a study that cannot be read or written

    WeldnetWarning                 a result that is right but may surprise

Every message names the thing, both values and the way out, on one line.
"""

from __future__ import annotations

__all__ = [
    "AlignmentError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FederatedError",
    "FusionError",
    "ModelError",
    "RecordError",
    "StructureError",
    "TrainingError",
    "UsageError",
    "WeldnetError",
    "WeldnetWarning",
    "WidthError",
]


class WeldnetError(Exception):
    """Base of every error that weldnet raises on purpose."""


class UsageError(WeldnetError, ValueError):
    """The arguments do not make sense together."""


class ConfigError(UsageError):
    """A config file cannot be read, or has a key or value that means nothing."""


class CheckpointError(WeldnetError):
    """A checkpoint is missing, unreadable, unwritable, or does not fit the model."""


class DataError(WeldnetError):
    """A dataset is missing, empty, or of the wrong shape."""


class ModelError(WeldnetError):
    """A model factory or a forward pass failed."""


class CaptureError(ModelError):
    """The forward pass cannot be traced."""


class StructureError(WeldnetError):
    """A renumbering that the structure allows changed the network's output."""


class AlignmentError(WeldnetError):
    """The networks cannot be aligned."""


class WidthError(AlignmentError):
    """The networks have unequal widths and the method needs equal ones."""


class FusionError(WeldnetError):
    """The aligned networks cannot be averaged or repaired."""


class TrainingError(WeldnetError):
    """A training run cannot go on."""


class FederatedError(WeldnetError):
    """A federated run cannot begin, go on or be resumed."""


class RecordError(WeldnetError):
    """Records of a study cannot be read or written."""


class WeldnetWarning(UserWarning):
    """A result that is right but may surprise."""
