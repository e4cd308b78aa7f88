"""Random programs: whatever capture declares free must be free. All sizes are equal, so that wrong ties fit."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from weldnet.structure import capture, random_renumbering, renumber


class Program(nn.Module):
    """Three to seven random steps on values of shape (2, 4, 4); the seed decides everything."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.weights = nn.ParameterDict()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.steps: list[str] = []
        self._growing = True
        self(torch.zeros(2, 4, 3))
        self._growing = False

    def weight(self, *shape: int) -> Tensor:
        self._count += 1
        key = f"w{self._count}"
        if self._growing:
            self.weights[key] = nn.Parameter(torch.zeros(shape))
        return self.weights[key]

    def forward(self, x: Tensor) -> Tensor:
        self._count = 0
        draw = random.Random(self.seed)
        pool = [self.stem(x).tanh()]
        self.steps = []
        for _ in range(draw.randint(3, 7)):
            step = draw.choice(list(STEPS))
            self.steps.append(step)
            pool.append(STEPS[step](self.weight, draw.choice(pool), draw.choice(pool), draw))
        last = pool[-1] + 0.1 * draw.choice(pool)
        if draw.random() < 0.7:
            return self.head(last.mean(1))
        return self.head(last.amax(1)) * (1 + last.flatten(1).std(1, keepdim=True))


def write_in_place(a: Tensor) -> Tensor:
    a = a.clone()
    a[:, :, 1:3] *= 2
    a.transpose(1, 2)[:, 0].add_(1)
    return a


def gated(both: Tensor) -> Tensor:
    left, right = both.chunk(2, 2)
    return left * right.sigmoid()


STEPS = {
    "linear": lambda w, a, b, d: F.linear(a, w(4, 4)).tanh(),
    "product": lambda w, a, b, d: (a @ w(4, 4)).sin(),
    "add": lambda w, a, b, d: a + b,
    "multiply": lambda w, a, b, d: w(4) * a * b,
    "fold": lambda w, a, b, d: torch.cat([a, b], 2).view(2, 4, 2, 4).amax(2),
    "concatenate": lambda w, a, b, d: F.linear(torch.cat([a, b], 2), w(4, 8)).tanh(),
    "transpose": lambda w, a, b, d: a.transpose(1, 2),
    "flat scale": lambda w, a, b, d: (w(16) * a.flatten(1)).view(2, 4, 4),
    "centre": lambda w, a, b, d: a - a.mean(d.choice([1, 2]), keepdim=True),
    "by the largest": lambda w, a, b, d: a * a.amax((1, 2), keepdim=True),
    "softmax": lambda w, a, b, d: a.softmax(d.choice([1, 2])),
    "layer norm": lambda w, a, b, d: F.layer_norm(a, (4,), w(4), w(4)),
    "group norm": lambda w, a, b, d: F.group_norm(a, 2, w(4), w(4)),
    "grouped": lambda w, a, b, d: F.conv1d(a.transpose(1, 2), w(4, 2, 1), groups=2).transpose(1, 2).tanh(),
    "table": lambda w, a, b, d: (w(16).view(4, 4) + a).exp().clamp(max=5),
    "largest of a table": lambda w, a, b, d: (w(4, 4) + a).amax(d.choice([1, 2]), keepdim=True) + b,
    "two tables": lambda w, a, b, d: (w(4, 4) * w(16).view(4, 4)).amax(d.choice([0, 1])) * a,
    "scores": lambda w, a, b, d: (a @ b.transpose(1, 2)).tanh(),
    "mixed product": lambda w, a, b, d: (a @ b).tanh(),
    "rejoin": lambda w, a, b, d: torch.cat([a[:, :, :2] * 2, b[:, :, 2:]], 2),
    "swap halves": lambda w, a, b, d: torch.cat([a[:, :, 2:], a[:, :, :2]], 2),
    "half mean": lambda w, a, b, d: a + b[:, :, :2].mean(2, keepdim=True),
    "glu": lambda w, a, b, d: F.glu(torch.cat([a, b], 2), 2),
    "stack": lambda w, a, b, d: torch.stack([a, b], 1).amax(1),
    "logsumexp": lambda w, a, b, d: a.logsumexp(2, keepdim=True) + w(4),
    "in place": lambda w, a, b, d: write_in_place(a),
    "repeat": lambda w, a, b, d: F.linear(a.repeat(1, 1, 2) + b.repeat_interleave(2, 2), w(4, 8)).tanh(),
    "normalise": lambda w, a, b, d: a / (1 + a.norm(dim=2, keepdim=True)),
    "outer": lambda w, a, b, d: (a.mean(1)[:, :, None] * b.mean(1)[:, None, :]).tanh(),
    "symmetric": lambda w, a, b, d: (w(4, 4) + w(4, 4).t()) @ a,
    "gate": lambda w, a, b, d: gated(F.linear(a, w(8, 4))),
    "reverse": lambda w, a, b, d: torch.stack(a.unbind(2)[::-1], 2),
    "diagonal": lambda w, a, b, d: a + a.diagonal(dim1=1, dim2=2)[:, None, :],
    "unknown": lambda w, a, b, d: a.cumsum(d.choice([1, 2])),
}


def error_of(seed: int) -> float:
    program = Program(seed).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in program.parameters():
        scale = 0.6 if parameter.dim() > 1 else 1.0
        parameter.data = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    structure = capture(program, x)
    with torch.no_grad():
        before = program(x)
        if not bool(torch.isfinite(before).all()):
            return 0.0
        worst = 0.0
        for _ in range(3):
            state = renumber(program.state_dict(), structure, random_renumbering(structure, generator))
            after = torch.func.functional_call(program, state, (x,))
            worst = max(worst, float((after - before).abs().max() / before.abs().max()))
    return worst


@pytest.mark.parametrize("block", range(6))
def test_random_programs_are_captured_soundly(block):
    for seed in range(50 * block, 50 * block + 50):
        assert error_of(seed) <= 1e-9, (seed, Program(seed).steps)
