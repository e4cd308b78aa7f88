"""Random networks as data: a list of steps that shrinks well and prints readably, and the module that it stands for.

Every value has the shape (2, tokens, channels), and most sizes of one network are equal, so that wrong ties fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import strategies as st
from torch import Tensor, nn

from random_steps import STEPS

__all__ = ["RandomNetwork", "Spec", "Step", "specs"]

#: How a weight may be kept; each makes the same shape from parameters of other shapes.
STORED = ("plain", "flat", "transposed", "halves", "normed", "standardised", "sum", "product")
HEADS = ("mean", "tokens", "flat", "largest", "spread")
BATCH, WORDS = 2, 3


@dataclass(frozen=True)
class Step:
    """One operation on earlier values; ``pick`` chooses among its variants.

    ``stored`` says how its weights are kept; ``shared`` takes weights of earlier steps where the shapes agree.
    """

    name: str
    left: int = 0
    right: int = 0
    pick: int = 0
    stored: str = "plain"
    shared: bool = False


@dataclass(frozen=True)
class Spec:
    """A network: sizes, steps, and how the last value (and an earlier one) becomes the output."""

    width: int
    tokens: int
    inputs: int
    steps: tuple[Step, ...]
    head: str = "mean"
    skip: int | None = None

    def __str__(self) -> str:
        lines = [f"{self.inputs} inputs, width {self.width}, {self.tokens} tokens"]
        for number, step in enumerate(self.steps, 1):
            how = "" if step.stored == "plain" else f", {step.stored}"
            how += ", shared" if step.shared else ""
            lines.append(f"  v{number} = {step.name}(v{step.left % number}, v{step.right % number}, {step.pick}{how})")
        return "\n".join([*lines, f"  {self.head} of the last" + ("" if self.skip is None else f" and v{self.skip}")])


def specs(*, tiny: bool) -> st.SearchStrategy[Spec]:
    """Random networks: three to seven steps of width 2 to 6, or so few and small that all reorderings can be tried."""
    number = st.integers(0, 5)
    steps = st.builds(
        Step,
        st.sampled_from(tuple(STEPS)),
        number,
        number,
        number,
        st.sampled_from(STORED + ("plain",) * (8 if tiny else 16)),
        st.sampled_from((False, False, False, True)),
    )
    return st.builds(
        Spec,
        st.sampled_from((2, 3) if tiny else (4, 4, 6, 3)),
        st.sampled_from((2, 1) if tiny else (4, 4, 2)),
        st.sampled_from((1,) if tiny else (3, 1, 4)),
        st.lists(steps, min_size=1, max_size=2).map(tuple)
        if tiny
        else st.lists(steps, min_size=3, max_size=7).map(tuple),
        st.sampled_from(HEADS),
        st.sampled_from((None, 0, 1)),
    )


class RandomNetwork(nn.Module):
    """The module that a spec stands for, in float64, with live random weights that the spec decides."""

    def __init__(self, spec: Spec, seed: int = 0) -> None:
        super().__init__()
        self.spec, self.width, self.tokens = spec, spec.width, spec.tokens
        self.weights = nn.ParameterDict()
        self.groups: dict[str, int] = {}
        self._growing, self._step = True, Step("stem")
        self._generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self(*self.example())  # makes the weights that it asks for
        self._growing, self._generator = False, None
        self.eval()

    def example(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Draw an input: numbers, and words of a small vocabulary."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(BATCH, self.spec.tokens, self.spec.inputs, generator=generator, dtype=torch.float64)
        return x, torch.randint(WORDS, (BATCH, self.spec.tokens), generator=generator)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        self.x, self.words, self._count, self._made = x, words, 0, []
        self._step = Step("stem")
        values = [self.linear(x, self.width).tanh()]
        for step in self.spec.steps:
            self._step = step
            left, right = (values[i % len(values)] for i in (self._step.left, self._step.right))
            values.append(STEPS[self._step.name](self, left, right, self._step.pick))
        self._step = Step("head")
        last = values[-1]
        if self.spec.skip is not None:
            last = last + 0.1 * self.fit(values[self.spec.skip % len(values)], last)
        answer = self._head(last)
        self.x, self.words, self._made = None, None, []
        return answer

    # -- what steps are made of ----------------------------------------------------------------------

    def weight(self, *shape: int, groups: int = 1) -> Tensor:
        """Return the next weight: a parameter, something made of parameters, or a weight that was used before.

        Args:
            shape: of the weight.
            groups: the weight's second axis means another channel for each of so many groups of the first.
        """
        if self._step.shared and (known := self._earlier(shape, groups)) is not None:
            return known
        made = self._stored(shape, groups)
        self._made.append((made, groups))
        return made

    def statistic(self, *shape: int) -> Tensor:
        """Return the next buffer; its values are positive."""
        self._count += 1
        name = f"statistic{self._count}"
        if self._growing:
            self.register_buffer(name, 0.5 + self._noise(shape).abs())
        return self.get_buffer(name)

    def linear(self, x: Tensor, outputs: int, *, bias: bool = False) -> Tensor:
        return F.linear(x, self.weight(outputs, x.shape[-1]), self.weight(outputs) if bias else None)

    def fit(self, x: Tensor, like: Tensor) -> Tensor:
        """Bring a value to another one's shape."""
        if x.shape[1] != like.shape[1]:
            x = x.mean(1, keepdim=True)
        return x if x.shape[2] == like.shape[2] else torch.tanh(self.linear(x, like.shape[2]))

    # -- helpers -------------------------------------------------------------------------------------

    def _head(self, last: Tensor) -> Tensor:
        outputs = 1 if self.spec.inputs == 1 else 2
        whole = {"tokens": last, "flat": last.flatten(1), "largest": last.amax(1)}.get(self.spec.head)
        head = self.linear(last.mean(1) if whole is None else whole, outputs, bias=outputs > 1)
        return head * (1 + last.flatten(1).std(1, keepdim=True)) if self.spec.head == "spread" else head

    def _parameter(self, *shape: int) -> Tensor:
        self._count += 1
        name = f"w{self._count}"
        if self._growing:
            scale = 1.0 if len(shape) < 2 else 1.2 / math.sqrt(math.prod(shape[1:]))
            self.weights[name] = nn.Parameter(scale * self._noise(shape))
        return self.weights[name]

    def _earlier(self, shape: Sequence[int], groups: int) -> Tensor | None:
        for tensor, grouped in reversed(self._made):
            if grouped == groups and tensor.shape == tuple(shape):
                return tensor
            if grouped == groups == 1 and tensor.dim() == 2 and tensor.shape[::-1] == tuple(shape):
                return tensor.t()
        return None

    def _stored(self, shape: tuple[int, ...], groups: int) -> Tensor:
        stored = self._step.stored
        if len(shape) < 2 or stored == "plain" or (groups > 1 and stored in ("halves", "product")):
            made = self._parameter(*shape)
            if groups > 1:
                self.groups[f"weights.w{self._count}"] = groups
            return made
        return _STORES[stored](self._parameter, shape)

    def _noise(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self._generator, dtype=torch.float64)


def _flat(new: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
    return new(math.prod(shape)).view(shape)


def _transposed(new: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
    return new(*shape[::-1]).permute(*range(len(shape))[::-1])


def _halves(new: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
    half = shape[0] // 2
    return torch.cat([new(half, *shape[1:]), new(shape[0] - half, *shape[1:])])


def _normed(new: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
    return torch._weight_norm(new(*shape), new(shape[0], *[1] * (len(shape) - 1)), 0)


def _standardised(new: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
    raw, axes = new(*shape), tuple(range(1, len(shape)))
    return (raw - raw.mean(axes, keepdim=True)) / (0.1 + raw.var(axes, unbiased=False, keepdim=True)).sqrt()


def _sum(new: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
    return new(*shape) + new(*shape).sin()


def _product(new: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
    return (new(shape[0], 2) @ new(2, math.prod(shape[1:]))).reshape(shape)


_STORES: dict[str, Callable[[Callable[..., Tensor], tuple[int, ...]], Tensor]] = {
    "flat": _flat,
    "transposed": _transposed,
    "halves": _halves,
    "normed": _normed,
    "standardised": _standardised,
    "sum": _sum,
    "product": _product,
}
