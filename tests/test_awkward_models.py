"""Models as people have them: each works, with its function kept, or one line says what to do."""

from __future__ import annotations

import copy
import dataclasses
import threading
import urllib.request
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import weldnet
from weldnet import checkpoints
from weldnet.cli import main
from weldnet.errors import CaptureError, ModelError, WeldnetError


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor):
        return self.b(torch.relu(self.a(x)))


class Prints(Base):
    def forward(self, x: Tensor) -> Tensor:
        print("shape", x.shape)
        return super().forward(x)


class Counts(Base):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1.0
        self.steps += 1
        return super().forward(x)


class Caches(Base):
    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(3.0)
        return super().forward(x) + self.table


class Nested(Base):
    def forward(self, x: Tensor):
        y = super().forward(x)
        return {"out": {"logits": [y, (2 * y,)]}, "loss": None, "name": "text"}


@dataclasses.dataclass(frozen=True)
class Answer:
    logits: Tensor
    top: int = 1


class Frozen(Base):
    def forward(self, x: Tensor):
        return Answer(super().forward(x))


class Scaled(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)
        self.register_buffer("mixing", torch.eye(2).to_sparse(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale + self.mixing.to_dense().sum()


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(8, 4, dtype=torch.complex64))
        self.b = nn.Parameter(torch.randn(3, 8, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.b @ (self.a @ x.T.to(self.a.dtype))).abs()


class LoRA(nn.Module):
    """A frozen linear layer with a trained low-rank part."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features))
        self.up = nn.Parameter(torch.randn(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class Tanh(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.tanh()


def with_lora() -> nn.Module:
    return nn.Sequential(LoRA(nn.Linear(4, 8)), nn.ReLU(), LoRA(nn.Linear(8, 3)))


def with_hooks() -> nn.Module:
    net, kept, lock = mlp(), {}, threading.Lock()
    net[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    net[0].register_forward_hook(lambda module, inputs, output: kept.__setitem__("hidden", output))
    net[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    net[2].register_full_backward_hook(lambda *_: None)
    net[1].register_forward_hook(lambda *_: lock.locked() or None)
    return net


def parametrized() -> nn.Module:
    net = mlp()
    parametrize.register_parametrization(net[0], "weight", Tanh())
    return net


def partly_compiled() -> nn.Module:
    net = mlp()
    net[0] = torch.compile(net[0], backend="eager")
    return net


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)).train()


#: What works: how it is made, and the fewest spaces that are found in it.
WORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "prints": (Prints, 1),
    "changes its own buffers": (Counts, 1),
    "caches a tensor": (Caches, 1),
    "nested dicts": (Nested, 1),
    "frozen dataclass": (Frozen, 1),
    "hooks": (with_hooks, 1),
    "buffers that are not saved": (Scaled, 1),
    "complex": (Complex, 1),
    "LoRA": (with_lora, 1),
    "parametrized": (parametrized, 1),
    "weight_norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 8)), nn.Linear(8, 3)), 0),
    "spectral_norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 8)), nn.Linear(8, 3)), 0),
    "dropout in training mode": (with_dropout, 1),
    "data parallel": (lambda: nn.DataParallel(mlp()), 1),
    "compiled": (lambda: torch.compile(mlp(), backend="fails_when_run"), 1),
    "partly compiled": (partly_compiled, 1),
    "bfloat16": (lambda: mlp().bfloat16(), 1),
    "float16": (lambda: mlp().half(), 1),
}


def made(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def example(model: nn.Module) -> Tensor:
    dtype = next(p.dtype for p in model.parameters())
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    return x.to(dtype) if dtype.is_floating_point else x


@pytest.fixture(autouse=True)
def no_compiler():
    """A backend that must not be run: compiled modules are unwrapped."""

    def fails(*_: object) -> None:
        raise AssertionError("the compiler ran")

    if "fails_when_run" not in torch._dynamo.list_backends(exclude_tags=()):
        torch._dynamo.register_backend(fails, name="fails_when_run")


@pytest.mark.parametrize(("build", "spaces"), WORKS.values(), ids=WORKS)
def test_it_works_and_stays_as_it_was(build, spaces):
    a, b = made(build, 0), made(build, 1)
    x = example(a)
    before = copy.deepcopy(a.state_dict())
    modes = [module.training for module in a.modules()]
    structure = weldnet.capture(a, x)
    assert len(structure.spaces) >= spaces
    weldnet.check(a, x, structure)
    alignment = weldnet.align([a, b], structure)
    assert set(alignment.couplings) == {"a", "b"}
    result = weldnet.fuse([a, b], x, progress=False)
    assert "passed" in result.report.check
    result.model(x)
    torch.testing.assert_close(dict(a.state_dict()), dict(before), rtol=0, atol=0)
    assert [module.training for module in a.modules()] == modes
    assert getattr(a, "calls", 0) == 0


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["data parallel", "compiled"])
def test_a_wrapper_changes_nothing(wrap):
    plain = [made(mlp, seed) for seed in (0, 1)]
    x = torch.randn(2, 4)
    expected = weldnet.fuse(plain, x, progress=False)
    got = weldnet.fuse([wrap(net) for net in plain], x, progress=False)
    assert weldnet.capture(wrap(plain[0]), x) == expected.structure
    assert type(got.model) is nn.Sequential
    torch.testing.assert_close(got.state_dict(), expected.state_dict(), rtol=0, atol=0)


# -- what cannot work --------------------------------------------------------------------------------


class Online(Base):
    def forward(self, x: Tensor) -> Tensor:
        urllib.request.urlopen("http://127.0.0.1:9/weights", timeout=1)
        return super().forward(x)


class Yields(Base):
    def forward(self, x: Tensor):
        yield super().forward(x)


class Holds(Base):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Sparse(Base):
    def __init__(self) -> None:
        super().__init__()
        self.a.weight = nn.Parameter(self.a.weight.detach().to_sparse())


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(mlp().eval(), {nn.Linear}, dtype=torch.qint8)


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(mlp(), torch.zeros(2, 4))


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(4, 8)), nn.Linear(8, 3))


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[WeldnetError], list[str]]] = {
    "needs the network": (Online, ModelError, ["Online", "refused", "no network and no file"]),
    "quantised": (quantised, CaptureError, ["'0' is quantised", "fuse the floating-point networks"]),
    "sparse": (Sparse, CaptureError, ["'a.weight' is sparse", ".to_dense()"]),
    "TorchScript": (scripted, CaptureError, ["TorchScript", "give the Python module"]),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(8)), CaptureError, ["'0.weight' is not initialised", "run the model"]),
    "yields": (Yields, CaptureError, ["returns a generator", "return tensors"]),
    "cannot be copied": (Holds, CaptureError, ["cannot be copied", "lock", "freshly built"]),
    "old weight_norm": (old_weight_norm, CaptureError, ["cannot be copied", "parametrizations.weight_norm"]),
}


@pytest.mark.parametrize(("build", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_it_says_in_one_line_what_to_do(build, kind, words):
    x = torch.zeros(2, 4)
    for use in (lambda: weldnet.capture(build(), x), lambda: weldnet.fuse([build(), build()], x, progress=False)):
        with pytest.raises(kind) as caught:
            use()
        message = str(caught.value)
        assert all(word in message for word in words), message
        assert "\n" not in message
        assert len(message) < 400


@pytest.mark.parametrize("name", ["Counts", "Nested", "Frozen", "with_hooks", "with_lora", "with_dropout"])
def test_the_command_line_takes_them_too(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec = f"{__file__}:{name}"
    for seed, file in enumerate(("a.pt", "b.pt")):
        checkpoints.save(made(globals()[name], seed).state_dict(), tmp_path / file)
    arguments = ["fuse", "a.pt", "b.pt", "-o", "f.pt", "--model", spec, "--input", "2,4"]
    assert main(arguments) == 0, capsys.readouterr().err
    assert "passed" in capsys.readouterr().out
