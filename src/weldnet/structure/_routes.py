"""Two routes from a model to the list of its operations, and which one to take."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from weldnet.errors import ModelError, UsageError
from weldnet.structure._export import export_trace
from weldnet.structure._meta import has_weights
from weldnet.structure._trace import Trace, trace

__all__ = ["ROUTES", "record"]

ROUTES = ("auto", "dispatch", "export")


def record(
    model: nn.Module, example_input: Any, outputs: str | Sequence[str] | None = None, route: str = "auto"
) -> Trace:
    """Write one forward pass down as a flat list of operations, by the route asked for.

    ``"dispatch"`` runs the pass and records what reaches torch's dispatcher; ``"export"`` asks ``torch.export`` for a
    graph; ``"auto"`` is the former and, for a model on the meta device where that fails, the latter.

    Raises:
        UsageError: there is no such route.
        ModelError: the forward pass itself fails on this input.
        CaptureError: the forward pass runs, but cannot be traced.
    """
    if route not in ROUTES:
        raise UsageError(f"no route {route!r}; the routes are {', '.join(ROUTES)}")
    with _silent("torch._subclasses.fake_tensor"):
        return _record(model, example_input, outputs, route)


def _record(model: nn.Module, example_input: Any, outputs: str | Sequence[str] | None, route: str) -> Trace:
    if route == "export":
        return export_trace(model, example_input, outputs)
    if route == "dispatch" or has_weights(model):
        return trace(model, example_input, outputs)
    try:
        return trace(model, example_input, outputs)
    except ModelError as error:  # a branch on a value that depends on weights, perhaps: export has its own ways
        try:
            return export_trace(model, example_input, outputs)
        except ModelError:
            raise error from None


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    """Keep a logger from printing a traceback of what is raised, and said in one line, anyway."""
    log = logging.getLogger(name)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
