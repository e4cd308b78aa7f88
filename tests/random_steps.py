"""The steps that random networks are made of: each maps two values of shape (2, tokens, channels) to another one.

``net`` gives weights (``net.weight``, ``net.linear``), brings a value to another's shape (``net.fit``) and has the
sizes; ``p`` from 0 to 5 picks a variant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

__all__ = ["STEPS"]

ACTIVATIONS = (torch.tanh, torch.sin, torch.sigmoid, F.gelu, F.softplus, F.silu)
PADDING = ("constant", "reflect", "circular", "replicate", "constant", "circular")

#: (net, left, right, pick) -> value
StepFunction = Callable[[Any, Tensor, Tensor, int], Tensor]


def divisor(n: int, p: int) -> int:
    """A divisor of n, not 1 if there is another."""
    found = [d for d in range(2, n + 1) if n % d == 0] or [1]
    return found[p % len(found)]


def channels_first(step: Callable[[Any, Tensor, int], Tensor]) -> StepFunction:
    return lambda net, a, b, p: step(net, a.transpose(1, 2), p).transpose(1, 2)


# -- layers --------------------------------------------------------------------------------------------


def linear(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    return ACTIVATIONS[p](net.linear(a, net.width, bias=p % 2 == 1))


def wide(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    return net.linear(a, p % 3 + 2, bias=p > 2).tanh()


def residual(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    return a + net.linear(ACTIVATIONS[p](net.linear(a, net.width)), a.shape[2]).tanh()


def bilinear(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    b = b if a.shape[1] == b.shape[1] else net.fit(b, a).expand_as(a)
    return F.bilinear(a, b, net.weight(net.width, a.shape[2], b.shape[2])).tanh()


def gate(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    if p == 5:
        return net.linear(a, net.width).sigmoid() * net.linear(a, net.width).tanh()
    both = net.linear(a, 2 * net.width)
    if p > 2:
        return F.glu(both, 2)
    left, right = both.chunk(2, 2) if p else both.view(*both.shape[:2], net.width, 2).unbind(3)
    return left.tanh() * right.sigmoid()


def squeeze_excite(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    inner = net.linear(a.mean(1), 2).tanh()
    return a * net.linear(inner, a.shape[2]).sigmoid()[:, None]


def recurrent(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    h = net.weight(net.width).expand(a.shape[0], -1).contiguous()
    n, c = net.width, a.shape[2]
    if p < 3:
        gates = (1, 4, 3)[p]
        ih, hh, bias = net.weight(gates * n, c), net.weight(gates * n, n), net.weight(gates * n)
    cell, outputs = h, []
    weights = None if p < 3 else [net.weight(g * n, k) for g in (4 if p < 5 else 3,) for k in (c, n)]
    if weights is not None:
        weights += [net.weight(weights[0].shape[0]), net.weight(weights[0].shape[0])]
        if p < 5:
            return torch._VF.lstm(a, (h[None], h[None]), weights, True, 1, 0.0, False, False, True)[0]
        return torch._VF.gru(a, h[None], weights, True, 1, 0.0, False, False, True)[0]
    for x in a.unbind(1):
        if p == 0:
            h = torch.tanh(F.linear(x, ih, bias) + F.linear(h, hh))
        elif p == 1:
            h, cell = torch._VF.lstm_cell(x, (h, cell), ih, hh, bias, bias)
        else:
            h = torch._VF.gru_cell(x, h, ih, hh, bias, bias)
        outputs.append(h)
    return torch.stack(outputs, 1)


# -- convolutions and pooling --------------------------------------------------------------------------


def convolution(net: Any, a: Tensor, p: int) -> Tensor:
    kernel = 1 if p > 3 or a.shape[2] < 2 else 3  # a kernel that sees only padding in some slots may swap them
    if kernel == 3:
        a = F.pad(a, (1, 1), PADDING[p] if a.shape[2] > 3 else "constant")
    return F.conv1d(a, net.weight(net.width, a.shape[1], kernel)).tanh()


def grouped(net: Any, a: Tensor, p: int) -> Tensor:
    groups = divisor(a.shape[1], p)
    wide = p % 2 if a.shape[2] > 1 else 0
    weight = net.weight(groups * (p // 3 + 1), a.shape[1] // groups, 1 + 2 * wide, groups=groups)
    return F.conv1d(a, weight, padding=wide, groups=groups).tanh()


def transposed(net: Any, a: Tensor, p: int) -> Tensor:
    groups = divisor(a.shape[1], p) if p > 2 else 1
    weight = net.weight(a.shape[1], max(net.width // groups, 1), 1, groups=groups)
    return F.conv_transpose1d(a, weight, groups=groups).tanh()


def image(net: Any, a: Tensor, p: int) -> Tensor:
    side = 2 if a.shape[2] == 4 else 1
    pixels = a.reshape(*a.shape[:2], side, -1)
    weight = net.weight(4 if p < 3 else net.width, a.shape[1], 1, 1 if p % 2 else pixels.shape[3])
    out = F.conv2d(pixels, weight, padding="same" if weight.shape[3] % 2 else 0).tanh()
    out = F.pixel_shuffle(out, 2) if p < 2 else F.pixel_unshuffle(out, 2) if p == 2 and out.shape[3] == 2 else out
    return out.flatten(2) if out.shape[2] * out.shape[3] <= 8 else F.avg_pool2d(out, 2).flatten(2)


def pooling(net: Any, a: Tensor, p: int) -> Tensor:
    if p < 2:
        pooled = (F.max_pool1d if p else F.avg_pool1d)(a, 3, 1, 1)
        return ramp(pooled) if a.shape[2] < 3 else pooled  # where a window covers everything, all see the same
    if p < 4:
        return ramp((F.adaptive_avg_pool1d if p == 2 else F.adaptive_max_pool1d)(a, 2))
    return ramp(F.interpolate(a, size=a.shape[2] + 1, mode="nearest" if p == 4 else "linear"))


def padding(net: Any, a: Tensor, p: int) -> Tensor:
    mode = PADDING[p % 3 + 1] if a.shape[2] > 1 else "replicate"
    return ramp(F.pad(a, (1, 0), mode)[:, :, :4])


def ramp(a: Tensor) -> Tensor:
    """Tell positions apart: whatever reads two copies of one number may swap them."""
    return a * torch.linspace(1, 2, a.shape[2], dtype=a.dtype)


# -- norms ---------------------------------------------------------------------------------------------


def layer_norm(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    c = a.shape[2]
    if p == 5:
        return F.layer_norm(a, tuple(a.shape[1:]), net.weight(*a.shape[1:]))
    return F.layer_norm(a, (c,), net.weight(c), net.weight(c)) if p < 3 else F.rms_norm(a, (c,), net.weight(c))


def batch_norm(net: Any, a: Tensor, p: int) -> Tensor:
    c = a.shape[1]
    mean, var = net.statistic(c), net.statistic(c)
    weight, bias = (net.weight(c), net.weight(c)) if p % 2 else (None, None)
    if p == 5:
        return F.instance_norm(torch.cat([a, a.sin()], 2), None, None, weight, bias)[:, :, : a.shape[2]]
    return F.batch_norm(a, mean, var, weight, bias)


def group_norm(net: Any, a: Tensor, p: int) -> Tensor:
    c = a.shape[1]
    affine = (net.weight(c), net.weight(c)) if p % 2 else (None, None)
    return F.group_norm(a, divisor(c, p), *affine)


# -- attention -----------------------------------------------------------------------------------------


def heads_of(net: Any, p: int) -> tuple[int, int]:
    return (2, 1) if net.width < 4 else ((2, 2), (2, 3), (3, 2), (2, 2), (2, 2), (4, 1))[p]


def attention(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    """Self, fused, grouped-query, cross, rotary, and the fused operation of torch."""
    heads, dim = heads_of(net, p)
    batch, tokens = a.shape[:2]
    source = b if p == 3 else a
    shared = heads // 2 if p == 2 and heads % 2 == 0 else 1
    if p == 1:
        q, k, v = net.linear(a, 3 * heads * dim).view(batch, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4)
    else:
        q = net.linear(a, heads * dim, bias=p == 0).view(batch, tokens, heads, dim).transpose(1, 2)
        k, v = (net.linear(source, heads // shared * dim).unflatten(2, (-1, dim)).transpose(1, 2) for _ in "kv")
        k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
    if p == 4:
        q, k = rotated(q), rotated(k)
    fused = F.scaled_dot_product_attention
    out = fused(q, k, v) if p == 5 else (q @ k.transpose(2, 3)).div(dim**0.5).softmax(3) @ v
    return net.linear(out.transpose(1, 2).flatten(2), net.width)


def strided_heads(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    """Heads count faster than what is inside them."""
    heads, dim = heads_of(net, p)
    q, k, v = (net.linear(a, heads * dim).view(*a.shape[:2], dim, heads).permute(0, 3, 1, 2) for _ in "qkv")
    out = (q @ k.transpose(2, 3)).softmax(3) @ v
    return net.linear(out.permute(0, 2, 3, 1).flatten(2), net.width)


def rotated(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None]
    if x.shape[3] % 2:
        return x * angle.cos()
    left, right = x.chunk(2, 3)
    return torch.cat([left * angle.cos() - right * angle.sin(), left * angle.sin() + right * angle.cos()], 3)


def positions(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    """A bias by relative position, or positions of its own for each token."""
    tokens = a.shape[1]
    apart = torch.arange(tokens)[:, None] - torch.arange(tokens)[None] + tokens - 1
    if p < 3:
        bias = net.weight(2 * tokens - 1, 2)[apart] @ net.weight(2)
        return ((a @ a.transpose(1, 2)).tanh() + bias).softmax(2) @ a
    return a + net.weight(tokens, a.shape[2])


def einsum_heads(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    heads, dim = heads_of(net, p)
    into = torch.einsum("btc,hcd->bthd", a, net.weight(heads, a.shape[2], dim)).tanh()
    into = into * into.softmax(p % 2 + 2)
    return torch.einsum("bthd,hdc->btc", into, net.weight(heads, dim, net.width))


def windows(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    if a.shape[1] % 2:
        return a - a.mean(1, keepdim=True)
    parts = a.view(a.shape[0], a.shape[1] // 2, 2, a.shape[2])
    parts = parts.transpose(1, 2) if p % 2 else parts
    scores = (parts @ parts.transpose(2, 3)).softmax(3) @ parts if p < 3 else parts * parts.amax(2, keepdim=True)
    return (scores.transpose(1, 2) if p % 2 else scores).flatten(1, 2)


# -- look-ups ------------------------------------------------------------------------------------------


def embedding(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    table = net.weight(3, a.shape[2])
    rows = F.embedding(net.words, table) if p < 3 else table[net.words]
    return a + rows[:, :1] if rows.shape[1] != a.shape[1] else a * rows


def constant_index(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    c = a.shape[2]
    order = torch.tensor([*range(1, c), 0]) if p % 2 else torch.arange(c).flip(0)
    picked = a[:, :, order] if p < 2 else a.index_select(2, order)
    return picked * a if p < 4 else torch.cat([picked[:, :, :1], a[:, :, 1:].sin()], 2)


# -- movement ------------------------------------------------------------------------------------------


def concatenate(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    parts = [a, (b if a.shape[1] == b.shape[1] else net.fit(b, a).expand_as(a)).cos()]
    if p == 4:
        parts = [torch.zeros_like(a[:, :, :1]), *parts]
    if p == 3 and net.x.shape[1] == a.shape[1]:
        parts = [*parts, net.x]
    whole = torch.cat(parts, 2)
    return whole.sin() if p == 5 and whole.shape[2] <= 6 else net.linear(whole, net.width).tanh()


def rejoin(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    b, h = net.fit(b, a).expand_as(a), a.shape[2] // 2
    if p < 2:
        return torch.cat([a[:, :, :h] * 2, b[:, :, h:].sin()], 2)
    if p < 4:
        return torch.cat([a[:, :, h:], a[:, :, :h].sin()], 2)
    return a.flip(2) * b if p == 4 else a.roll(1, 2).sin()


def fold(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    both = torch.cat([a, net.fit(b, a).expand_as(a).cos()], 2)
    if p < 3:
        return both.view(*a.shape[:2], 2, a.shape[2]).amax(2)
    return both.view(*a.shape[:2], a.shape[2], 2).mean(3).tanh()


def repeat(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    b = net.fit(b, a).expand_as(a)
    return net.linear(a.repeat(1, 1, 2) + b.repeat_interleave(2, 2), net.width).tanh()


def flat_scale(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    size = a.shape[1] * a.shape[2]
    if p < 3:
        return (net.weight(size) * a.flatten(1)).view(a.shape)
    return net.linear(a.flatten(1), size).tanh().view(a.shape)


def shuffle(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    d = divisor(a.shape[2], p)
    blocks = a.unflatten(2, (d, -1))
    if p > 3:
        return (blocks.softmax(3) * blocks.amax(2, keepdim=True)).flatten(2)
    return blocks.transpose(2, 3).flatten(2) * (a if p < 3 else 1)


def half_mean(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    return a + b[:, :, : (b.shape[2] + 1) // 2].mean((1, 2), keepdim=True).tanh()


def in_place(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    a = a.clone()
    if p < 2:
        a[:, :, 1:3] *= 2
        a.transpose(1, 2)[:, 0].add_(1)
    elif p < 4:
        a[:, :, : a.shape[2] // 2] = net.fit(b, a).sin()[:, :, : a.shape[2] // 2]
    else:
        a[:, 0] = a[:, -1].sin()
    return a


# -- tables, products, what needs the order --------------------------------------------------------------


def table(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    t, c = a.shape[1:]
    if p < 2:
        return (net.weight(t * c).view(t, c) + a).exp().clamp(max=5)
    if p < 4:
        return ((net.weight(t, c) + a).amax(p - 1, keepdim=True) + a).tanh()
    return (net.weight(t, c) * net.weight(t * c).view(t, c)).amax(p - 4) * (a if p == 4 else a.amax(2, keepdim=True))


def scores(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    b = net.fit(b, a).expand_as(a)
    if p < 2:
        return (a @ b.transpose(1, 2)).tanh()
    if p < 4:
        return torch.cdist(a, b).sin()
    square = a @ b if a.shape[1] == a.shape[2] and p == 4 else a.mean(1)[:, :, None] * b.mean(1)[:, None, :]
    return square.tanh()


def symmetric(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    weight = net.weight(a.shape[1], a.shape[1])
    return (weight + (net.weight(a.shape[1], a.shape[1]) if p < 3 else weight).t()) @ a


def statistics(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    if p < 2:
        return a - a.mean(p + 1, keepdim=True)
    if p == 2:
        return a * a.amax((1, 2), keepdim=True)
    if p == 3:
        return a / (1 + a.norm(dim=2, keepdim=True))
    return a.softmax(2) if p == 4 else a.logsumexp(2, keepdim=True) + net.weight(a.shape[2])


def diagonal(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    return a + a.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] if p < 3 else a.tril() if p == 3 else a.triu().sin()


def ordered(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    axis = p % 2 + 1
    if p < 2:
        return a.cumsum(axis)
    if p < 4:
        return a.sort(axis).values
    return torch.fft.rfft(a, dim=1).abs() if p == 4 else a.topk(1, 2).values + a


def unknown(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    if p < 3:
        regular = torch.linalg.matrix_exp(net.weight(a.shape[2], a.shape[2]).tanh())
        return torch.linalg.solve(regular, a.transpose(1, 2)).transpose(1, 2).tanh()
    if p == 3:
        return a * torch.histc(a.detach().mean(1), bins=2, min=-1, max=1).sum()
    return a @ torch.linalg.matrix_exp((a.transpose(1, 2) @ a).tanh())


def where(net: Any, a: Tensor, b: Tensor, p: int) -> Tensor:
    weight = net.weight(a.shape[2])
    return torch.where(a > a.mean(2, keepdim=True), weight * a.sin(), weight + a)


STEPS: dict[str, StepFunction] = {
    "linear": linear,
    "width": wide,
    "product": lambda net, a, b, p: (a @ net.weight(a.shape[2], net.width)).sin(),
    "residual": residual,
    "add": lambda net, a, b, p: (a + net.fit(b, a)).tanh(),
    "multiply": lambda net, a, b, p: net.weight(a.shape[2]) * a * net.fit(b, a),
    "bilinear": bilinear,
    "gate": gate,
    "squeeze and excite": squeeze_excite,
    "recurrent": recurrent,
    "convolution": channels_first(convolution),
    "grouped": channels_first(grouped),
    "transposed convolution": channels_first(transposed),
    "image": channels_first(image),
    "pooling": channels_first(pooling),
    "padding": channels_first(padding),
    "layer norm": layer_norm,
    "batch norm": channels_first(batch_norm),
    "group norm": channels_first(group_norm),
    "attention": attention,
    "strided heads": strided_heads,
    "positions": positions,
    "einsum heads": einsum_heads,
    "windows": windows,
    "embedding": embedding,
    "constant index": constant_index,
    "concatenate": concatenate,
    "rejoin": rejoin,
    "fold": fold,
    "unbind": lambda net, a, b, p: torch.stack(a.unbind(2)[::-1], 2).sin(),
    "transpose": lambda net, a, b, p: a.transpose(1, 2),
    "repeat": repeat,
    "flat scale": flat_scale,
    "shuffle": shuffle,
    "half mean": half_mean,
    "in place": in_place,
    "in place again": in_place,
    "table": table,
    "scores": scores,
    "symmetric": symmetric,
    "statistics": statistics,
    "diagonal": diagonal,
    "ordered": ordered,
    "unknown": unknown,
    "where": where,
    "prelu": channels_first(lambda net, a, p: F.prelu(a - 0.3, net.weight(a.shape[1] if p < 4 else 1))),
}
