"""What is known of a model once and for all: its structure, which tensors are learned, which are the outputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, final

from torch import Tensor, nn

from weldnet._modules import bare
from weldnet.checkpoints import load_into, resized
from weldnet.errors import AlignmentError, CheckpointError, ModelError
from weldnet.structure import Structure, capture, require_correspondence

__all__ = ["Blueprint"]

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@final
@dataclass(frozen=True, eq=False)
class Blueprint:
    """A model seen from the server: made once a run, used every round.

    Args:
        model: a network of the server's widths; its weights do not matter, and it is not changed.
        example_input: what it takes.
        structure: where its units lie.
    """

    model: nn.Module
    example_input: Any
    structure: Structure
    _others: dict[Shapes, Structure] = field(default_factory=dict[Shapes, Structure], repr=False)

    @staticmethod
    def of(model: nn.Module, example_input: Any, outputs: str | Sequence[str] | None = None) -> Blueprint:
        """Capture a model's structure; arguments and errors as :func:`weldnet.capture`."""
        model = bare(model)
        return Blueprint(model, example_input, capture(model, example_input, outputs))

    @cached_property
    def parameters(self) -> frozenset[str]:
        """The names of the tensors that training changes by gradients; the others are buffers."""
        state = self.model.state_dict(keep_vars=True)
        return frozenset(name for name, tensor in state.items() if isinstance(tensor, nn.Parameter))

    @cached_property
    def last(self) -> dict[str, int]:
        """The axis of every parameter whose positions are the network's outputs, one for one: the last layer's."""
        return {
            frozen.tensor: frozen.axis
            for frozen in self.structure.frozen
            if frozen.reason == "network output"
            and frozen.tensor in self.parameters
            and frozen.count == self.structure.shapes[frozen.tensor][frozen.axis]
        }

    def structure_of(
        self, state: Mapping[str, Tensor], reference: Mapping[str, Tensor], *, any_width: bool
    ) -> Structure:
        """Return the structure of a state dict with the reference's names.

        Args:
            state: of the model, or of one of its other widths.
            reference: the server's.
            any_width: whether other widths are welcome.

        Raises:
            CheckpointError: shapes differ in a way that is not welcome, or that no width explains.
        """
        for name, tensor in state.items():
            if tensor.shape == reference[name].shape:
                continue
            if not any_width:
                raise CheckpointError(
                    f"{name} has shape {tuple(tensor.shape)}, the server's {tuple(reference[name].shape)}"
                )
            return self._captured(state)
        return self.structure

    def module(self, state: Mapping[str, Tensor]) -> nn.Module:
        """Return a network with these weights, also of another width."""
        same = all(tuple(state[name].shape) == shape for name, shape in self.structure.shapes.items())
        model = copy.deepcopy(self.model) if same else resized(self.model, state, self.example_input)
        load_into(model, state, "client")
        return model

    def _captured(self, state: Mapping[str, Tensor]) -> Structure:
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in state.items())
        if shapes not in self._others:
            try:
                other = resized(self.model, state, self.example_input)
                found = capture(other, self.example_input)
                require_correspondence(self.structure, found, ("the server", "the client"))
            except (AlignmentError, ModelError) as error:
                raise CheckpointError(f"shapes that are no other width of the server's model: {error}") from error
            self._others[shapes] = found
        return self._others[shapes]
