"""Small networks by name, one or more for every kind of layer and wiring that structure capture must understand.

``free`` states the number of renumberings as factorials: ``(6, 2, 2)`` means 6! 2! 2!. ``deaf`` lists places whose
movement cannot show in the output, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils import _pytree as pytree


class Net(nn.Module):
    """Modules by name, parameters by name, and a function of (self, inputs)."""

    def __init__(self, function: Callable[..., Any], **members: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised row by row in every pass (NFNet)."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = functional.batch_norm(rows, None, None, self.bias, training=True).reshape_as(self.weight)
        return self._conv_forward(x, weight, None)


@dataclass(frozen=True)
class Network:
    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = ()
    free: tuple[int, ...] | None = None
    inputs: Callable[[], Any] | None = None
    unknown: frozenset[str] = frozenset()
    deaf: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def log10(self) -> float:
        return sum(log10_factorial(n) for n in self.free or ())

    def example(self, seed: int = 0) -> Any:
        """Draw an example input in float64."""
        generator = torch.Generator().manual_seed(seed)
        if self.inputs is None:
            return torch.randn(self.shape, generator=generator, dtype=torch.float64)
        return pytree.tree_map_only(
            Tensor,
            lambda t: torch.randn(t.shape, generator=generator, dtype=torch.float64) if t.is_floating_point() else t,
            self.inputs(),
        )

    def model(self, seed: int = 0) -> nn.Module:
        """Build the network with live activations, in float64 and eval mode."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return enliven(self.build(), self.example(seed + 1), seed)


def log10_factorial(n: int) -> float:
    return sum(math.log10(k) for k in range(2, n + 1))


def enliven(model: nn.Module, example: Any, seed: int = 0) -> nn.Module:
    """Give every parameter random values of a sensible size, and norms the statistics of the resulting activations."""
    generator = torch.Generator().manual_seed(seed + 100)
    model = model.double().train()
    scales = {
        id(p)
        for m in model.modules()
        if isinstance(m, _NormBase | nn.LayerNorm | nn.GroupNorm)
        for n, p in m.named_parameters(recurse=False)
        if n == "weight"
    }
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        fan = math.prod(parameter.shape[1:]) if parameter.dim() > 1 else 4
        parameter.data.copy_(1 + 0.3 * noise if id(parameter) in scales else noise * (1.5 / math.sqrt(fan)))
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    momenta = [n.momentum for n in norms]
    model.eval()
    for norm in norms:
        norm.train().momentum = 1.0 if isinstance(norm, _InstanceNorm) else None
    with torch.no_grad():
        args = example if isinstance(example, tuple) else () if isinstance(example, dict) else (example,)
        kwargs = example if isinstance(example, dict) else {}
        for step in range(2 if norms else 0):
            model(
                *pytree.tree_map_only(Tensor, lambda t, s=step: t + s if t.is_floating_point() else t, args),
                **kwargs,
            )
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def sequential(*layers: nn.Module) -> Callable[[], nn.Module]:
    """A factory of nn.Sequential; the layers are made anew by :meth:`Network.model`, which re-randomises them."""
    return lambda: nn.Sequential(*layers)


def normal(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


# -- forward passes that need more than one line ---------------------------------------------------


def dense(m: Any, x: Tensor) -> Tensor:
    a = torch.relu(m.a(x))
    b = torch.relu(m.b(torch.cat([x, a], 1)))
    return m.head(torch.cat([x, b, a], 1).mean((2, 3)))


def padded_shortcut(m: Any, x: Tensor) -> Tensor:
    x = torch.relu(m.stem(x))
    y = m.norm(m.two(torch.relu(m.one(x))))
    x = torch.relu(y + functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
    return m.head(x.mean((2, 3)))


def recurrent(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.read(x[:, 0]))
    for step in range(1, x.shape[1]):
        h = torch.tanh(m.read(x[:, step]) + m.keep(h))
    return m.head(h)


def in_place(m: Any, x: Tensor) -> Tensor:
    h = functional.relu(m.a(x), inplace=True)
    h += m.b(x)
    h[:, :3] *= 2
    h.mul_(0.5).clamp_(-2, 2)
    return m.head(h)


def slice_written(m: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(x.shape[0], 7)
    h[:, 1:5] = m.a(x)
    h[:, 5:] = torch.tanh(m.b(x))
    return m.head(h)


def views(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(x @ m.first.T)
    h = torch.tanh(h @ m.second.view(6, 5) + m.both[:5])
    return functional.linear(h, m.third.transpose(0, 1).contiguous(), m.both[5:])


def counting(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    m.mean.mul_(0.9).add_(x.mean(), alpha=0.1)
    return m.head(torch.relu(m.a(x - m.mean)))


def attention(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.head((x + m.attention(x, x, x, need_weights=False)[0]).mean(1))


def self_attention_by_hand(m: Any, x: Tensor) -> Tensor:
    x = torch.tanh(m.stem(x))
    b, s, _ = x.shape
    q, k, v = (t.view(b, s, 2, 3).transpose(1, 2) for t in (m.q(x), m.k(x), m.v(x)))
    y = (q @ k.transpose(-1, -2) / 3**0.5).softmax(-1) @ v
    return m.head(x + m.o(y.transpose(1, 2).reshape(b, s, 6)))


def tied_modules() -> nn.Module:
    first, last = nn.Linear(5, 6), nn.Linear(6, 5)
    last.weight = nn.Parameter(first.weight.data.T.contiguous())
    second = nn.Linear(6, 6)
    third = nn.Linear(6, 6)
    third.weight = second.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third, nn.Tanh(), last)


def unet(m: Any, x: Tensor) -> Tensor:
    a = torch.relu(m.down(x))
    b = torch.relu(m.bottom(functional.max_pool2d(a, 2)))
    up = functional.interpolate(b, scale_factor=2, mode="nearest") + functional.interpolate(
        b, scale_factor=2, mode="bilinear"
    )
    return m.head(torch.cat([a, up], 1))


def transposed_grouped(m: Any, x: Tensor) -> Tensor:
    return m.head(torch.relu(m.up(torch.relu(m.stem(x)))).mean((2, 3)))


def gated(m: Any, x: Tensor) -> Tensor:
    a, b, c = m.up(x).split([4, 4, 3], dim=1)
    return m.head(torch.cat([a * torch.sigmoid(b), torch.tanh(c)], 1))


IMAGE = (2, 3, 6, 6)
EQUAL = "the norm subtracts it again"
SOFT = "softmax does not see a shift of all scores of a query"


def _table() -> list[Network]:
    conv, relu = nn.Conv2d, nn.ReLU
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def tail(units: int) -> tuple[nn.Module, ...]:
        return (*pool, nn.Linear(units, 3))

    def hidden(name: str, *layers: nn.Module, free: tuple[int, ...] = (6,)) -> Network:
        """Six hidden units with something between two linear layers."""
        return Network(name, sequential(nn.Linear(5, 6), *layers, nn.Linear(6, 3)), (4, 5), free)

    def channels(name: str, *layers: nn.Module, free: tuple[int, ...] = (6,), **options: Any) -> Network:
        """Six channels with something between a convolution and the head."""
        return Network(name, sequential(conv(3, 6, 3, padding=1), *layers, *tail(6)), IMAGE, free, **options)

    def act(*layers: nn.Module) -> list[Network]:
        return [hidden(type(layer).__name__.lower(), layer) for layer in layers]

    def unruly(name: str, function: Callable[..., Any], unknown: str = "", **options: Any) -> Network:
        build = lambda: Net(function, a=nn.Linear(5, 6), b=nn.Linear(6, 4), head=nn.Linear(4, 3))  # noqa: E731
        return Network(name, build, (4, 5), (4,), unknown=frozenset(unknown.split()), **options)

    return [
        # linear and convolutions
        Network(
            "linear", sequential(nn.Linear(5, 6), relu(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), (4, 5), (6, 4)
        ),
        Network("linear_no_bias", sequential(nn.Linear(5, 6, bias=False), relu(), nn.Linear(6, 3)), (4, 5), (6,)),
        Network("linear_on_tokens", sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)), (2, 4, 5), (6,)),
        Network(
            "bilinear",
            lambda: Net(
                lambda m, x: m.head(m.mix(m.a(x), torch.relu(m.b(x)))),
                a=nn.Linear(5, 4),
                b=nn.Linear(5, 3),
                mix=nn.Bilinear(4, 3, 5),
                head=nn.Linear(5, 2),
            ),
            (4, 5),
            (4, 3, 5),
        ),
        Network(
            "conv1d",
            sequential(
                nn.Conv1d(2, 5, 3),
                relu(),
                nn.MaxPool1d(2),
                nn.Conv1d(5, 4, 2),
                nn.AvgPool1d(2),
                nn.Flatten(),
                nn.Linear(8, 3),
            ),
            (2, 2, 12),
            (5, 4),
        ),
        Network(
            "conv2d",
            sequential(conv(3, 6, 3), relu(), conv(6, 4, 3, stride=2, padding=1), relu(), *tail(4)),
            IMAGE,
            (6, 4),
        ),
        Network(
            "conv2d_reflect",
            sequential(
                conv(3, 6, 3, padding=1, padding_mode="reflect"),
                relu(),
                conv(6, 4, 3, padding="same", padding_mode="replicate"),
                relu(),
                *tail(4),
            ),
            IMAGE,
            (6, 4),
        ),
        Network(
            "conv2d_circular",
            sequential(conv(3, 6, 3), relu(), conv(6, 4, 3, padding=1, padding_mode="circular"), relu(), *tail(4)),
            IMAGE,
            (6, 4),
        ),
        Network(
            "slices_rejoined",
            lambda: Net(
                lambda m, x: m.head(torch.cat([(h := m.a(x).relu())[:, :3], h[:, 3:] * 2], 1)),
                a=nn.Linear(5, 7),
                head=nn.Linear(7, 3),
            ),
            (4, 5),
            (3, 4),
        ),
        Network(
            "two_constants",
            lambda: Net(
                lambda m, x: m.head(torch.cat([m.a(x), x.new_zeros(4, 2), x.new_ones(4, 2)], 1)),
                a=nn.Linear(5, 4),
                head=nn.Linear(8, 3),
            ),
            (4, 5),
            (4, 2, 2),
            deaf={"head.weight": "columns that only see equal constants"},
        ),
        Network(
            "pad_and_add",
            lambda: Net(
                lambda m, x: m.head((h := m.a(x).relu()) + functional.pad(h[:, :3], (0, 4))),
                a=nn.Linear(5, 7),
                head=nn.Linear(7, 3),
            ),
            (4, 5),
            (3, 4),
        ),
        Network(
            "standardised_weight",
            lambda: Net(
                lambda m, x: m.head(
                    functional.conv2d(m.a(x), m.w - m.w.mean((1, 2, 3), keepdim=True)).relu().mean((2, 3))
                ),
                a=conv(3, 4, 1),
                w=normal(5, 4, 3, 3),
                head=nn.Linear(5, 3),
            ),
            IMAGE,
            (4, 5),
        ),
        Network(
            "normalised",
            lambda: Net(
                lambda m, x: m.head(functional.normalize(m.a(x).relu(), dim=1)), a=nn.Linear(5, 6), head=nn.Linear(6, 3)
            ),
            (4, 5),
            (6,),
        ),
        Network(
            "maxout",
            lambda: Net(
                lambda m, x: m.head(m.a(x).view(4, 5, 3).max(2).values), a=nn.Linear(5, 15), head=nn.Linear(5, 3)
            ),
            (4, 5),
            (5, *(3,) * 5),
        ),
        Network(
            "outer",
            lambda: Net(
                lambda m, x: m.head((m.a(x)[:, :, None] * m.b(x)[:, None, :]).flatten(1)),
                a=nn.Linear(5, 4),
                b=nn.Linear(5, 3),
                head=nn.Linear(12, 3),
            ),
            (4, 5),
        ),
        Network(
            "gram",
            lambda: Net(
                lambda m, x: m.head(((h := m.a(x).flatten(2)) @ h.mT).flatten(1)),
                a=conv(3, 4, 3),
                head=nn.Linear(16, 3),
            ),
            IMAGE,
        ),
        Network(
            "conv2d_unbatched",
            lambda: Net(lambda m, x: m.b(torch.relu(m.a(x))), a=conv(3, 5, 3), b=conv(5, 2, 2)),
            (3, 5, 5),
            (5,),
        ),
        Network(
            "conv3d",
            sequential(
                nn.Conv3d(2, 5, 2),
                relu(),
                nn.MaxPool3d(2),
                nn.Conv3d(5, 4, 1),
                nn.AdaptiveAvgPool3d(1),
                nn.Flatten(),
                nn.Linear(4, 3),
            ),
            (2, 2, 5, 5, 5),
            (5, 4),
        ),
        Network(
            "grouped",
            sequential(conv(3, 8, 1), relu(), conv(8, 12, 3, groups=4), relu(), *tail(12)),
            IMAGE,
            (4, *(2,) * 4, *(3,) * 4),
        ),
        Network(
            "grouped_twice",
            sequential(
                conv(3, 8, 1), relu(), conv(8, 12, 3, groups=4), relu(), conv(12, 8, 1, groups=4), nn.Tanh(), *tail(8)
            ),
            IMAGE,
            (4, *(2,) * 4, *(3,) * 4, *(2,) * 4),
        ),
        Network(
            "grouped_standardised",
            lambda: nn.Sequential(
                conv(3, 8, 1),
                nn.ReLU(),
                Standardised(8, 12, 3, groups=4),
                nn.ReLU(),
                Standardised(12, 8, 1, groups=4),
                nn.Tanh(),
                conv(8, 3, 1),
            ),
            IMAGE,
            (4, *(2,) * 4, *(3,) * 4, *(2,) * 4),
        ),
        Network("grouped_input", sequential(conv(4, 8, 3, groups=2), relu(), *tail(8)), (2, 4, 6, 6), (4, 4)),
        Network(
            "grouped_1d",
            sequential(
                nn.Conv1d(2, 6, 1), relu(), nn.Conv1d(6, 4, 3, groups=2), relu(), nn.Flatten(), nn.Linear(16, 3)
            ),
            (2, 2, 6),
            (2, 3, 3, 2, 2),
        ),
        Network(
            "depthwise",
            sequential(conv(3, 6, 1), relu(), conv(6, 6, 3, groups=6), nn.Tanh(), conv(6, 5, 1), relu(), *tail(5)),
            IMAGE,
            (6, 5),
        ),
        Network(
            "depthwise_twofold",
            sequential(conv(3, 5, 1), relu(), conv(5, 10, 3, groups=5), nn.Tanh(), *tail(10)),
            IMAGE,
            (5, *(2,) * 5),
        ),
        Network(
            "transposed",
            sequential(conv(3, 6, 3), relu(), nn.ConvTranspose2d(6, 4, 2, stride=2), relu(), *tail(4)),
            IMAGE,
            (6, 4),
        ),
        Network(
            "transposed_grouped",
            lambda: Net(
                transposed_grouped, stem=conv(3, 8, 3), up=nn.ConvTranspose2d(8, 12, 2, groups=4), head=nn.Linear(12, 3)
            ),
            IMAGE,
            (4, *(2,) * 4, *(3,) * 4),
        ),
        Network(
            "transposed_1d",
            sequential(
                nn.Conv1d(2, 4, 3),
                relu(),
                nn.ConvTranspose1d(4, 4, 3, groups=4),
                relu(),
                nn.Flatten(),
                nn.Linear(24, 3),
            ),
            (2, 2, 6),
            (4,),
        ),
        # norms
        channels("batch_norm", nn.BatchNorm2d(6), relu()),
        channels("batch_norm_plain", nn.BatchNorm2d(6, affine=False), relu()),
        channels("batch_norm_untracked", nn.BatchNorm2d(6, track_running_stats=False), relu(), deaf={"0.bias": EQUAL}),
        hidden("batch_norm_1d", nn.BatchNorm1d(6), nn.Tanh()),
        Network(
            "batch_norm_3d",
            sequential(
                nn.Conv3d(2, 5, 2), nn.BatchNorm3d(5), relu(), nn.AdaptiveMaxPool3d(1), nn.Flatten(), nn.Linear(5, 3)
            ),
            (2, 2, 4, 4, 4),
            (5,),
        ),
        channels("group_norm", nn.GroupNorm(3, 6), relu(), free=(3, 2, 2, 2)),
        channels("group_norm_one", nn.GroupNorm(1, 6), relu()),
        channels("group_norm_each", nn.GroupNorm(6, 6), relu(), deaf={"0.bias": EQUAL}),
        channels("instance_norm", nn.InstanceNorm2d(6, affine=True), relu(), deaf={"0.bias": EQUAL}),
        channels("instance_norm_tracked", nn.InstanceNorm2d(6, affine=True, track_running_stats=True), relu()),
        hidden("layer_norm", nn.LayerNorm(6), relu()),
        Network(
            "layer_norm_image",
            sequential(conv(3, 4, 3), nn.LayerNorm((4, 4, 4)), relu(), conv(4, 5, 2), nn.Flatten(), nn.Linear(45, 3)),
            IMAGE,
            (4, 5),
        ),
        hidden("rms_norm", nn.RMSNorm(6), relu()),
        # activations
        *act(
            nn.PReLU(6),
            nn.GELU(),
            nn.Softmax(1),
            nn.SiLU(),
            nn.ELU(),
            nn.Hardswish(),
            nn.Softplus(),
            nn.LogSoftmax(1),
            nn.LeakyReLU(),
            nn.Sigmoid(),
            nn.Mish(),
            nn.SELU(),
            nn.Hardtanh(),
            nn.Softmin(1),
            nn.Tanhshrink(),
            nn.Hardsigmoid(),
            nn.CELU(),
        ),
        hidden("gelu_tanh", nn.GELU("tanh")),
        hidden("prelu_one", nn.PReLU()),
        channels("prelu_channels", nn.PReLU(6)),
        Network("glu", sequential(nn.Linear(5, 12), nn.GLU(), nn.Linear(6, 3)), (4, 5), (6,)),
        # pooling and dropout
        channels("max_pool", relu(), nn.MaxPool2d(3, 2, 1)),
        channels("avg_pool", relu(), nn.AvgPool2d(2, ceil_mode=True)),
        channels("adaptive_avg_pool", relu(), nn.AdaptiveAvgPool2d((3, 2))),
        channels("adaptive_max_pool", nn.Tanh(), nn.AdaptiveMaxPool2d(2)),
        channels("lp_pool", relu(), nn.LPPool2d(2, 2)),
        Network(
            "adaptive_pool_1d",
            sequential(
                nn.Conv1d(2, 6, 3),
                relu(),
                nn.AdaptiveAvgPool1d(3),
                nn.AdaptiveMaxPool1d(2),
                nn.Flatten(),
                nn.Linear(12, 3),
            ),
            (2, 2, 9),
            (6,),
        ),
        hidden("dropout", nn.Dropout(0.5), relu(), nn.AlphaDropout(0.2)),
        channels("dropout2d", nn.Dropout2d(0.5), relu()),
        # wiring
        Network(
            "residual",
            lambda: Net(
                lambda m, x: m.head((h := torch.relu(m.stem(x))) + m.down(torch.relu(m.up(h)))),
                stem=nn.Linear(5, 6),
                up=nn.Linear(6, 7),
                down=nn.Linear(7, 6),
                head=nn.Linear(6, 3),
            ),
            (4, 5),
            (6, 7),
        ),
        Network(
            "residual_downsample",
            lambda: Net(
                lambda m, x: m.head(
                    torch.relu(m.bn(m.two(torch.relu(m.one(h := m.stem(x))))) + m.skip(h)).mean((2, 3))
                ),
                stem=conv(3, 4, 3),
                one=conv(4, 5, 3, padding=1),
                two=conv(5, 6, 1, stride=2),
                bn=nn.BatchNorm2d(6),
                skip=conv(4, 6, 1, stride=2),
                head=nn.Linear(6, 3),
            ),
            IMAGE,
            (4, 5, 6),
        ),
        Network(
            "concatenation",
            lambda: Net(dense, a=conv(3, 4, 3, padding=1), b=conv(7, 5, 3, padding=1), head=nn.Linear(12, 3)),
            IMAGE,
            (4, 5),
        ),
        Network("split", lambda: Net(gated, up=nn.Linear(5, 11), head=nn.Linear(7, 3)), (4, 5), (4, 3)),
        Network(
            "chunk",
            lambda: Net(
                lambda m, x: m.head(torch.mul(*m.up(x).chunk(2, -1))), up=nn.Linear(5, 12), head=nn.Linear(6, 3)
            ),
            (4, 5),
            (6,),
        ),
        Network(
            "flatten",
            sequential(conv(3, 5, 3), relu(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(20, 6), relu(), nn.Linear(6, 3)),
            IMAGE,
            (5, 6),
        ),
        Network(
            "view",
            lambda: Net(
                lambda m, x: m.head(torch.relu(m.a(x)).view(x.shape[0], -1)), a=conv(3, 5, 3), head=nn.Linear(80, 3)
            ),
            IMAGE,
            (5,),
        ),
        Network(
            "reshape_two_steps",
            lambda: Net(
                lambda m, x: m.head(torch.relu(m.a(x)).reshape(x.shape[0], 5, 16).reshape(x.shape[0], 80)),
                a=conv(3, 5, 3),
                head=nn.Linear(80, 3),
            ),
            IMAGE,
            (5,),
        ),
        Network(
            "permute",
            lambda: Net(
                lambda m, x: m.head(torch.relu(m.a(x)).permute(0, 2, 3, 1).reshape(x.shape[0], -1)),
                a=conv(3, 5, 3),
                head=nn.Linear(80, 3),
            ),
            IMAGE,
            (5,),
        ),
        Network(
            "channels_last_mlp",
            lambda: Net(
                lambda m, x: m.head(torch.relu(m.mix(torch.relu(m.a(x)).permute(0, 2, 3, 1))).mean((1, 2))),
                a=conv(3, 5, 3),
                mix=nn.Linear(5, 4),
                head=nn.Linear(4, 3),
            ),
            IMAGE,
            (5, 4),
        ),
        Network(
            "tokens",
            lambda: Net(
                lambda m, x: m.head(m.norm(m.a(x).flatten(2).transpose(1, 2)).mean(1)),
                a=conv(3, 6, 2, stride=2),
                norm=nn.LayerNorm(6),
                head=nn.Linear(6, 3),
            ),
            IMAGE,
            (6,),
        ),
        Network(
            "mean_over_space",
            lambda: Net(lambda m, x: m.head(torch.relu(m.a(x)).mean((-2, -1))), a=conv(3, 5, 3), head=nn.Linear(5, 3)),
            IMAGE,
            (5,),
        ),
        Network(
            "unflatten",
            lambda: Net(
                lambda m, x: m.head(torch.relu(m.a(x)).unflatten(1, (5, 2, 2))), a=nn.Linear(4, 20), head=conv(5, 2, 2)
            ),
            (3, 4),
            (5,),
        ),
        Network(
            "pixel_shuffle",
            sequential(conv(3, 16, 3), nn.PixelShuffle(2), relu(), conv(4, 5, 3, stride=2), relu(), *tail(5)),
            IMAGE,
            (4, 5),
        ),
        Network(
            "pixel_shuffle_pooled",
            sequential(conv(3, 16, 3), nn.PixelShuffle(2), relu(), *tail(4)),
            IMAGE,
            (4, *(4,) * 4),
        ),
        Network("pixel_unshuffle", sequential(conv(3, 4, 3), relu(), nn.PixelUnshuffle(2), *tail(16)), IMAGE, (4,)),
        Network("channel_shuffle", sequential(conv(3, 6, 3), relu(), nn.ChannelShuffle(2), *tail(6)), IMAGE, (6,)),
        Network(
            "padded_shortcut",
            lambda: Net(
                padded_shortcut,
                stem=conv(3, 4, 3, padding=1),
                one=conv(4, 5, 3, stride=2, padding=1),
                two=conv(5, 8, 3, padding=1),
                norm=nn.BatchNorm2d(8),
                head=nn.Linear(8, 3),
            ),
            IMAGE,
            (4, 4, 5),
        ),
        Network(
            "unet",
            lambda: Net(unet, down=conv(3, 4, 3, padding=1), bottom=conv(4, 5, 3, padding=1), head=conv(9, 2, 1)),
            IMAGE,
            (4, 5),
        ),
        Network(
            "stacked",
            lambda: Net(
                lambda m, x: m.head(torch.stack([torch.tanh(m.a(x)), torch.relu(m.b(x))], 1).sum(1)),
                a=nn.Linear(5, 6),
                b=nn.Linear(5, 6),
                head=nn.Linear(6, 3),
            ),
            (4, 5),
            (6,),
        ),
        Network(
            "squeeze_excite",
            lambda: Net(
                lambda m, x: m.head(
                    (
                        (h := torch.relu(m.a(x)))
                        * torch.sigmoid(m.up(torch.relu(m.down(h.mean((2, 3)))))).view(2, 6, 1, 1)
                    ).mean((2, 3))
                ),
                a=conv(3, 6, 3),
                down=nn.Linear(6, 4),
                up=nn.Linear(4, 6),
                head=nn.Linear(6, 3),
            ),
            IMAGE,
            (6, 4),
        ),
        # parameters put together, positions flattened
        Network(
            "registers",
            lambda: Net(
                lambda m, x: m.head(
                    m.norm(torch.cat([t.expand(2, -1, -1) for t in (m.cls, m.register)] + [m.a(x)], 1)).tanh().mean(1)
                ),
                a=nn.Linear(5, 6),
                cls=normal(1, 1, 6),
                register=normal(1, 4, 6),
                norm=nn.LayerNorm(6),
                head=nn.Linear(6, 3),
            ),
            (2, 3, 5),
            (6, 4),
            deaf={"register": "registers may change places by themselves"},
        ),
        Network(
            "joined_weights",
            lambda: Net(
                lambda m, x: m.head(functional.linear(m.a(x), torch.cat([m.one, m.two])).tanh()),
                a=nn.Linear(5, 4),
                one=normal(2, 4),
                two=normal(3, 4),
                head=nn.Linear(5, 3),
            ),
            (4, 5),
            (4, 2, 3),
        ),
        Network(
            "positions_flattened",
            lambda: Net(
                lambda m, x: m.head((m.a(x) + m.position).tanh().flatten(1)),
                a=nn.Linear(5, 6),
                position=normal(3, 6),
                head=nn.Linear(18, 3),
            ),
            (2, 3, 5),
            (6,),
        ),
        Network(
            "zeros_like",
            lambda: Net(
                lambda m, x: m.head(torch.cat([torch.zeros_like((h := m.a(x).tanh())[:, :1]), h], 1)),
                a=nn.Linear(5, 6),
                head=nn.Linear(7, 3),
            ),
            (4, 5),
            (6,),
        ),
        Network(
            "grouped_from_a_vector",
            lambda: Net(
                lambda m, x: m.head(
                    functional.conv1d(m.a(x)[..., None], m.w.view(4, 2, 1), groups=4).tanh().flatten(1)
                ),
                a=nn.Linear(5, 8),
                w=normal(8),
                head=nn.Linear(4, 3),
            ),
            (4, 5),
            (4, *(2,) * 4),
        ),
        # sharing
        Network(
            "used_twice",
            lambda: Net(
                lambda m, x: m.head(torch.tanh(m.b(torch.tanh(m.b(torch.tanh(m.a(x))))))),
                a=nn.Linear(5, 6),
                b=nn.Linear(6, 6),
                head=nn.Linear(6, 3),
            ),
            (4, 5),
            (6,),
        ),
        Network(
            "recurrent",
            lambda: Net(recurrent, read=nn.Linear(5, 6), keep=nn.Linear(6, 6), head=nn.Linear(6, 3)),
            (2, 3, 5),
            (6,),
        ),
        Network("tied_modules", tied_modules, (4, 5), (6,)),
        Network(
            "tied_transposed",
            lambda: Net(
                lambda m, x: functional.linear(m.norm(torch.tanh(m.embed(x))), m.embed.weight.T),
                embed=nn.Linear(5, 6),
                norm=nn.LayerNorm(6),
            ),
            (4, 5),
            (6,),
        ),
        Network(
            "two_names",
            lambda: Net(
                lambda m, x: m.head(torch.tanh(m.again(torch.tanh(m.b(m.a(x)))))),
                a=nn.Linear(5, 4),
                head=nn.Linear(4, 3),
                **dict.fromkeys(("b", "again"), nn.Linear(4, 4)),
            ),
            (4, 5),
            (4,),
        ),
        # in place, and parameters through views
        Network(
            "in_place",
            lambda: Net(in_place, a=nn.Linear(5, 7), b=nn.Linear(5, 7), head=nn.Linear(7, 3)),
            (4, 5),
            (3, 4),
        ),
        Network(
            "slice_written",
            lambda: Net(slice_written, a=nn.Linear(5, 4), b=nn.Linear(5, 2), head=nn.Linear(7, 3)),
            (4, 5),
            (4, 2),
        ),
        Network(
            "views",
            lambda: Net(views, first=normal(6, 4), second=normal(30), third=normal(5, 3), both=normal(8)),
            (4, 4),
        ),
        Network(
            "parameter_scale",
            lambda: Net(
                lambda m, x: m.head(m.a(x).tanh() * m.scale + m.shift),
                a=nn.Linear(5, 6),
                scale=normal(6),
                shift=normal(1),
                head=nn.Linear(6, 3),
            ),
            (4, 5),
            (6,),
        ),
        Network(
            "linear_as_conv",
            lambda: Net(
                lambda m, x: m.head(functional.conv2d(m.a(x).relu(), m.w[:, :, None, None]).relu().mean((2, 3))),
                a=conv(3, 6, 1),
                w=normal(4, 6),
                head=nn.Linear(4, 3),
            ),
            IMAGE,
            (6, 4),
        ),
        Network(
            "einsum",
            lambda: Net(
                lambda m, x: m.head(torch.einsum("bi,oi->bo", m.a(x).relu(), m.w).relu()),
                a=nn.Linear(5, 6),
                w=normal(4, 6),
                head=nn.Linear(4, 3),
            ),
            (4, 5),
            (6, 4),
        ),
        Network(
            "class_token",
            lambda: Net(
                lambda m, x: m.head(
                    torch.tanh(torch.cat([m.token.expand(2, -1, -1), m.a(x)], 1) + m.positions).mean(1)
                ),
                a=nn.Linear(5, 6),
                token=normal(1, 1, 6),
                positions=normal(1, 5, 6),
                head=nn.Linear(6, 3),
            ),
            (2, 4, 5),
            (6,),
        ),
        # attention
        Network(
            "attention",
            lambda: Net(
                attention,
                stem=nn.Linear(5, 6),
                attention=nn.MultiheadAttention(6, 2, batch_first=True),
                head=nn.Linear(6, 3),
            ),
            (2, 4, 5),
            (6, 2, *(3,) * 4),
        ),
        Network(
            "attention_by_hand",
            lambda: Net(
                self_attention_by_hand,
                stem=nn.Linear(5, 7),
                q=nn.Linear(7, 6),
                k=nn.Linear(7, 6),
                v=nn.Linear(7, 6),
                o=nn.Linear(6, 7),
                head=nn.Linear(7, 3),
            ),
            (2, 4, 5),
            (7, 2, *(3,) * 4),
            deaf={"k.bias": SOFT},
        ),
        Network(
            "encoder_layer",
            sequential(nn.Linear(5, 6), nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Linear(6, 3)),
            (2, 4, 5),
            (6, 8, 2, *(3,) * 4),
        ),
        Network(
            "encoder_prenorm",
            sequential(nn.Linear(5, 6), nn.TransformerEncoderLayer(6, 3, 7, norm_first=True), nn.Linear(6, 3)),
            (2, 4, 5),
            (6, 7, 3, *(2,) * 6),
        ),
        # inputs and outputs
        Network(
            "two_inputs",
            lambda: Net(
                lambda m, x, y: m.head(torch.relu(m.a(x)) * m.b(y)),
                a=nn.Linear(5, 6),
                b=nn.Linear(4, 6),
                head=nn.Linear(6, 3),
            ),
            free=(6,),
            inputs=lambda: (torch.zeros(3, 5), torch.zeros(3, 4)),
        ),
        Network(
            "dict_input",
            lambda: Net(
                lambda m, left, right: m.head(torch.cat([m.a(left), m.b(right).relu()], 1)),
                a=nn.Linear(5, 3),
                b=nn.Linear(4, 4),
                head=nn.Linear(7, 3),
            ),
            free=(3, 4),
            inputs=lambda: {"left": torch.zeros(3, 5), "right": torch.zeros(3, 4)},
        ),
        Network(
            "two_outputs",
            lambda: Net(
                lambda m, x: {"y": m.head((h := m.a(x)).relu()), "rest": (m.side(h), 1.0)},
                a=nn.Linear(5, 6),
                side=nn.Linear(6, 2),
                head=nn.Linear(6, 3),
            ),
            (4, 5),
            (6,),
        ),
        Network(
            "hidden_output",
            lambda: Net(
                lambda m, x: (m.head(m.b(h := m.a(x)).relu()), h),
                a=nn.Linear(5, 6),
                b=nn.Linear(6, 4),
                head=nn.Linear(4, 3),
            ),
            (4, 5),
            (4,),
        ),
        Network(
            "embedding",
            lambda: Net(
                lambda m, ids: m.head(torch.tanh(m.b(m.embed(ids)))),
                embed=nn.Embedding(7, 5),
                b=nn.Linear(5, 4),
                head=nn.Linear(4, 3),
            ),
            free=(5, 4),
            inputs=lambda: torch.tensor([[0, 3, 6], [1, 1, 5]]),
        ),
        # without a rule, or without freedom
        unruly("cumsum", lambda m, x: m.head(torch.relu(m.b(m.a(x).cumsum(1))))),
        unruly("sort", lambda m, x: m.head(torch.relu(m.b(m.a(x).sort(1).values)))),
        unruly(
            "fft",
            lambda m, x: m.head(torch.relu(m.b(torch.fft.rfft(m.a(x), n=10).real))),
        ),
        unruly(
            "linalg",
            lambda m, x: m.head(torch.relu(m.b(torch.linalg.solve(torch.eye(6, dtype=x.dtype) * 2, m.a(x).T).T))),
            "aten._linalg_solve_ex",
        ),
        Network(
            "flip_add",
            lambda: Net(
                lambda m, x: m.head(torch.relu(m.b((h := torch.tanh(m.a(x))) + h.flip(1)))),
                a=nn.Linear(5, 6),
                b=nn.Linear(6, 4),
                head=nn.Linear(4, 3),
            ),
            (4, 5),
            (4,),
        ),
        Network(
            "roll_add",
            lambda: Net(
                lambda m, x: m.head(torch.relu(m.b((h := torch.tanh(m.a(x))) + h.roll(1, 1)))),
                a=nn.Linear(5, 6),
                b=nn.Linear(6, 4),
                head=nn.Linear(4, 3),
            ),
            (4, 5),
            (4,),
        ),
        Network(
            "part_mean",
            lambda: Net(
                lambda m, x: m.head(torch.relu(m.b((h := m.a(x).tanh())[:, :3].mean(1, keepdim=True) * h[:, 3:]))),
                a=nn.Linear(5, 7),
                b=nn.Linear(4, 5),
                head=nn.Linear(5, 3),
            ),
            (4, 5),
            (3, 4, 5),
        ),
        Network(
            "one_singled_out",
            lambda: Net(
                lambda m, x: m.head(torch.relu((h := m.a(x)) + h[:, 2:3])), a=nn.Linear(5, 6), head=nn.Linear(6, 3)
            ),
            (4, 5),
            (5,),
        ),
        Network(
            "argmax",
            lambda: Net(
                lambda m, x: m.head(torch.relu(m.b(h := m.a(x)))) + h.argmax(1, keepdim=True),
                a=nn.Linear(5, 6),
                b=nn.Linear(6, 4),
                head=nn.Linear(4, 3),
            ),
            (4, 5),
            (4,),
        ),
        Network(
            "unused",
            lambda: Net(
                lambda m, x: m.head(torch.relu(m.a(x))), a=nn.Linear(5, 6), idle=nn.Linear(6, 4), head=nn.Linear(6, 3)
            ),
            (4, 5),
            (6,),
        ),
        Network(
            "positions",
            lambda: Net(
                lambda m, x: m.head(torch.tanh(m.a(x) + torch.arange(6, dtype=x.dtype))),
                a=nn.Linear(5, 6),
                head=nn.Linear(6, 3),
            ),
            (4, 5),
            (),
        ),
        Network(
            "counting",
            lambda: Net(counting, a=nn.Linear(5, 6), head=nn.Linear(6, 3), calls=torch.tensor(0), mean=torch.zeros(1)),
            (4, 5),
            (6,),
        ),
        Network(
            "weight_norm",
            sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), nn.ReLU(), nn.Linear(6, 3)),
            (4, 5),
            (6,),
        ),
        Network(
            "lstm",
            lambda: Net(lambda m, x: m.head(m.rnn(x)[0]), rnn=nn.LSTM(4, 5, batch_first=True), head=nn.Linear(5, 3)),
            (2, 3, 4),
            (5,),
        ),
        Network(
            "gru",
            lambda: Net(lambda m, x: m.head(m.rnn(x)[0]), rnn=nn.GRU(4, 5, batch_first=True), head=nn.Linear(5, 3)),
            (2, 3, 4),
            (5,),
        ),
    ]


NETWORKS: dict[str, Network] = {network.name: network for network in _table()}
