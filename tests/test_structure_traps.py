"""Programs that a simpler engine captures wrongly: nothing in them may break."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import weldnet
from weldnet.errors import AlignmentError, StructureError
from weldnet.structure import capture, random_renumbering, renumber


class Program(nn.Module):
    def __init__(self, function: Callable[[Program, Tensor], Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def grouped(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    return torch._grouped_mm(x, stack, offs=ends)


def ends(x: Tensor, threshold: float) -> Tensor:
    """How many rows the first of two matrices gets depends on the input."""
    count = (x[:, 0] > threshold).sum()
    return torch.stack([count, torch.full_like(count, x.shape[0])]).to(torch.int32)


def swapped_rows(s, x):
    order = torch.tensor([1, 2, 3, 0, 5, 6, 7, 4])
    return grouped(grouped(x, s.w0, (e := ends(x, 0.8))).relu()[order], s.w2, e)


def patterned(s, x):
    h = F.linear(x, s.a).relu()
    z = torch.zeros(3, 2, 4, dtype=x.dtype)
    z[:, torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([2, 3, 0, 1, 2, 3])] = h[:, torch.tensor([2, 3, 0, 1, 2, 3])]
    return z @ s.b


def kept_on(s, x):
    torch.manual_seed(7)
    return (F.linear(x, s.a).relu() * F.dropout(torch.ones(3, 8), 0.5, True).to(x.dtype)) @ s.b.T


EXPERTS = {"w0": (2, 4, 8), "w2": (2, 8, 8)}
SIGNAL = (2, 4, 3)
CONSTANT = torch.arange(32.0, dtype=torch.float64).view(8, 4, 1)

#: What makes a grouped weight out of a parameter of its shape, and does not take every row by itself.
COMPUTED: dict[str, Callable[[Tensor], Tensor]] = {
    "less its mean over the rows": lambda w: w - w.mean(0, keepdim=True),
    "less its mean over all": lambda w: w - w.mean(),
    "with its rows flipped": lambda w: w.flip(0) * 1,
    "with its columns flipped": lambda w: w + w.flip(1),
    "with its columns summed up": lambda w: w.cumsum(1),
    "with its columns sorted": lambda w: w.sort(1).values,
    "with its columns masked": lambda w: w * torch.tensor([1.0, 0.5, 0.2, 0.1], dtype=w.dtype)[:, None],
    "of half of its columns": lambda w: torch.cat([w[:, :2].tanh(), w[:, 2:]], 1),
    "less its mean over pairs of rows": lambda w: (w.view(4, 2, 4, 1) - w.view(4, 2, 4, 1).mean(1, True)).view(8, 4, 1),
    "over its largest number": lambda w: w / w.abs().amax(),
    "written over in place": lambda w: (v := w.clone(), v[0].zero_())[0],
}

TRAPS: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]], tuple[int, ...]]] = {
    "experts: rows flipped": (
        lambda s, x: grouped(grouped(x, s.w0, (e := ends(x, 0.8))).relu().flip(0), s.w2, e),
        EXPERTS,
        (8, 4),
    ),
    "experts: rows in another order": (swapped_rows, EXPERTS, (8, 4)),
    "experts: rows given out anew": (
        lambda s, x: grouped(grouped(x, s.w0, ends(x, 0.8)).relu(), s.w2, ends(x, -0.8)),
        EXPERTS,
        (8, 4),
    ),
    "experts: halves of the rows": (
        lambda s, x: (h := grouped(x, s.w0, ends(x, 0.8)).relu())[:4] @ s.b + h[4:] @ s.c,
        {"w0": (2, 4, 8), "b": (8, 3), "c": (8, 3)},
        (8, 4),
    ),
    "experts: rows as a batch": (
        lambda s, x: torch.bmm(grouped(x, s.w0, ends(x, 0.8)).relu().view(2, 4, 8), s.w2).flatten(0, 1),
        {"w0": (2, 4, 8), "w2": (2, 8, 3)},
        (8, 4),
    ),
    "experts: rows from two layers": (
        lambda s, x: grouped(torch.cat([x[:4] @ s.a, x[4:] @ s.c]).relu(), s.w2, ends(x, 0.8)),
        {"a": (4, 8), "c": (4, 8), "w2": (2, 8, 4)},
        (8, 4),
    ),
    "groups: a constant weight": (
        lambda s, x: F.conv1d(F.conv1d(F.conv1d(x, s.a).relu(), CONSTANT.to(x.dtype), groups=2).relu(), s.c),
        {"a": (8, 4, 1), "c": (3, 8, 1)},
        SIGNAL,
    ),
    "groups: a weight from the input": (
        lambda s, x: F.conv1d(
            F.conv1d(F.conv1d(x, s.a).relu(), x.reshape(-1)[:16].view(8, 2, 1), groups=4).relu(), s.c
        ),
        {"a": (8, 4, 1), "c": (3, 8, 1)},
        SIGNAL,
    ),
    "groups: a weight from a network": (
        lambda s, x: F.conv1d(F.conv1d(x, s.a).relu(), (s.h @ x.mean((0, 2))).view(8, 4, 1), groups=2),
        {"a": (8, 4, 1), "h": (32, 4)},
        SIGNAL,
    ),
    "groups: a weight in another shape": (
        lambda s, x: F.conv1d(F.conv1d(F.conv1d(x, s.a).relu(), s.w.view(8, 4, 1) * 1, groups=2).relu(), s.c),
        {"a": (8, 4, 1), "w": (4, 8), "c": (3, 8, 1)},
        SIGNAL,
    ),
    "groups: a transposed weight": (
        lambda s, x: F.conv1d(F.conv1d(F.conv1d(x, s.a).relu(), s.w.transpose(0, 1), groups=2).relu(), s.c),
        {"a": (8, 4, 1), "w": (4, 6, 1), "c": (3, 6, 1)},
        SIGNAL,
    ),
    "groups: a permuted weight": (
        lambda s, x: F.conv1d(F.conv1d(F.conv1d(x, s.a).relu(), s.w.permute(2, 0, 1), groups=2, padding=1).relu(), s.c),
        {"a": (8, 4, 1), "w": (4, 3, 8), "c": (3, 8, 1)},
        SIGNAL,
    ),
    **{
        f"groups: a weight {name}": (
            lambda s, x, f=function: F.conv1d(F.conv1d(F.conv1d(x, s.a).relu(), f(s.w), groups=2).relu(), s.c),
            {"a": (8, 4, 1), "w": (8, 4, 1), "c": (3, 8, 1)},
            SIGNAL,
        )
        for name, function in COMPUTED.items()
    },
    "groups: a weight that is used as a whole too": (
        lambda s, x: (
            F.conv1d(F.conv1d(F.conv1d(x, s.a).relu(), s.w * 2, groups=2).relu(), s.c) + s.w.mean(0).square()[0]
        ),
        {"a": (8, 4, 1), "w": (8, 4, 1), "c": (3, 8, 1)},
        SIGNAL,
    ),
    "groups: a computed weight in groups of other sizes": (
        lambda s, x: F.conv1d(
            F.conv1d((h := F.conv1d(x, s.a).relu()), (w := s.w * 2), groups=2)
            + F.conv1d(torch.cat([h, h], 1), w, groups=4),
            s.c,
        ),
        {"a": (8, 4, 1), "w": (8, 4, 1), "c": (3, 8, 1)},
        SIGNAL,
    ),
    "constants that tell units apart": (patterned, {"a": (4, 4), "b": (4, 2)}, (3, 4)),
    "a mask of bytes": (
        lambda s, x: F.linear(x, s.a)[:, torch.tensor([1, 1, 0, 0, 1, 0, 1, 1], dtype=torch.uint8)] @ s.b[:, :5].T,
        {"a": (8, 4), "b": (5, 8)},
        (3, 4),
    ),
    "dropout that stays on": (kept_on, {"a": (8, 4), "b": (5, 8)}, (3, 4)),
}


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_captured_soundly(name: str):
    function, shapes, shape = TRAPS[name]
    torch.manual_seed(0)
    low = name.startswith("experts")  # a kernel that is not made for float64
    dtype = torch.float32 if low else torch.float64
    model, x = Program(function, **shapes).to(dtype), torch.randn(shape, dtype=dtype)
    structure = capture(model, x)
    for seed in range(6):
        sources = random_renumbering(structure, torch.Generator().manual_seed(seed))
        state = renumber(model.state_dict(), structure, sources)
        for given in (x, torch.randn(shape, dtype=dtype)):
            with torch.no_grad():
                before = model(given)
                after = torch.func.functional_call(model, state, (given,))
            assert float((after - before).abs().max() / before.abs().max()) <= (1e-4 if low else 1e-9)


def test_a_structure_of_another_model_is_refused():
    def net(hidden: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 3))

    x = torch.randn(2, 4)
    structure = capture(net(8), x)
    for other in (net(16), nn.Sequential(net(8))):
        for test in (weldnet.check, weldnet.power):
            with pytest.raises(StructureError, match="capture the structure of this very model"):
                test(other, x, structure)
    couplings = weldnet.align([net(8), net(8)], structure, method="weight_matching")["b"]
    with pytest.raises(AlignmentError, match=r"no tensor '0.weight'"):
        weldnet.transport(nn.Sequential(net(8)).state_dict(), structure, couplings)
