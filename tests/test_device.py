"""What is asked to be on a device is there: no tensor stays behind, the work is done there, results are the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import weldnet
from accelerator import Accelerator, Far, MixedDevicesError, is_far
from device_cases import DATA, FEW, LABELS, X, conv, far, same_state
from networks import NETWORKS
from weldnet._arrays import find_device, send
from weldnet.activations import run
from weldnet.alignment import METHODS, Alignment, Gamf, OptimalTransport, make_method
from weldnet.checkpoints import save
from weldnet.errors import DataError, ModelError, UsageError
from weldnet.evaluation import plane
from weldnet.fusion import REPAIRS, Rescale, Synthetic
from weldnet.training import Recipe, fine_tune

#: Without the methods that run networks on data.
CHOSEN = [
    *(make_method(n, **FEW.get(n, {})) for n in METHODS if not make_method(n).needs_data and n != "identity"),
    *(Gamf(sigma=4.0, gamma=0.3), Gamf(affinity="vector", gamma=0.3), OptimalTransport(plan="entropic")),
    Gamf(precision="bfloat16", gamma=0.3),
]


_STEPS: dict[str, Any] = {"steps": 2, "epochs": 2, "samples": 32, "batch_size": 16}
#: Those that do.
WATCHING = [
    make_method("activation_matching", look="both"),
    Gamf(activations=1.0, gamma=0.3),
    OptimalTransport(on="activations"),
    make_method("straight_through", epochs=2, samples=32, batch_size=16),
    make_method("sinkhorn_rebasin", loss="midpoint", **_STEPS),
    make_method("sinkhorn_rebasin", loss="random", **_STEPS),
]


def same_alignment(a: Alignment, b: Alignment) -> bool:
    return a.couplings.keys() == b.couplings.keys() and all(
        torch.equal(coupling.matrix(), b[name][space].matrix())
        for name, couplings in a.couplings.items()
        for space, coupling in couplings.items()
    )


# -- the device itself -------------------------------------------------------------------------------


def test_the_device_refuses_what_a_real_one_does():
    with Accelerator() as device:
        there = torch.ones(2, 2).to("lazy")
        assert isinstance(there, Far)
        assert there.device.type == "lazy"
        assert float((there @ there).sum()) == 8
        with pytest.raises(MixedDevicesError, match="CPU"):
            there + torch.ones(2)
        assert float((there + torch.tensor(1.0)).sum()) == 8  # single numbers may come from the CPU,
        with pytest.raises(MixedDevicesError, match="CPU"):
            torch.zeros(()).add_(there.sum())  # but do not go to it
        with pytest.raises(MixedDevicesError, match="generator"):
            torch.randn(2, device="lazy", generator=torch.Generator())
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
        picked = there[torch.tensor([1])]
        with pytest.raises(MixedDevicesError, match="CPU"):
            there[torch.tensor([1])] = torch.ones(1, 2)
    assert isinstance(picked, Far)
    assert (device.here, device.there) == (0, 1)
    assert [copied.shape for copied in device.sent] == [(2, 2)]


def test_training_runs_on_the_device():
    with Accelerator() as device:
        net = nn.Linear(3, 1).to("lazy")
        before = net.weight.detach().cpu().clone()
        net(torch.ones(2, 3, device="lazy")).sum().backward()
        torch.optim.SGD(net.parameters(), 0.5).step()
        assert torch.equal(net.weight.detach().cpu(), before - 1)
    assert device.here == 0


def test_a_device_that_is_not_here_is_refused():
    for ask in (
        lambda: weldnet.evaluate(conv(), (DATA, LABELS), device="lazy"),
        lambda: weldnet.fuse([conv(), conv()], X, device="lazy", progress=False),
        lambda: weldnet.barrier(conv(), conv(), evaluate=(DATA, LABELS), device="lazy"),
        lambda: weldnet.barrier(conv(), conv(), evaluate=lambda network: 1.0, device="lazy"),
        lambda: plane(conv(), conv(1), conv(2), evaluate=lambda network: 1.0, device="lazy"),
        lambda: weldnet.fold(conv(), conv(), X, device="lazy"),
    ):
        with pytest.raises(UsageError, match="device 'lazy' cannot be used here"):
            ask()


class Pinning(TorchFunctionMode):
    """Takes note of what is to be pinned and sent to a GPU, and leaves it in ordinary memory of the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[Tensor] = []
        self.sent: list[tuple[Tensor, dict[str, Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to and args[1:] and torch.device(args[1]).type == "cuda":
            self.sent.append((args[0], kwargs))
            return args[0]
        pinned = kwargs.pop("pin_memory", False)
        found = func(*args, **kwargs)
        if pinned:
            self.pinned.append(found)
        return found


def test_a_batch_goes_to_a_gpu_from_pinned_memory():
    """Also one whose channels share their memory; values, type and layout are those that ``Tensor.to`` gives."""
    gray, gpu = torch.arange(32.0).reshape(2, 1, 4, 4), torch.device("cuda", 0)
    for batch in (gray, gray.expand(-1, 3, -1, -1), gray.repeat(1, 3, 1, 1)[:, ::2], gray.transpose(0, 3)):
        for dtype, layout in ((None, torch.preserve_format), (torch.float16, torch.channels_last)):
            with Pinning() as device:
                found = send(batch, gpu, dtype, memory_format=layout)
            (pinned,), ((sent, options),) = device.pinned, device.sent
            assert found is sent is pinned
            assert options == {"non_blocking": True}
            assert torch.equal(found, batch.to(dtype or batch.dtype))
            assert found.dtype == (dtype or batch.dtype)
            assert found.untyped_storage().nbytes() == found.nbytes  # no place twice
            assert layout is torch.preserve_format or found.is_contiguous(memory_format=layout)


def test_a_batch_on_the_cpu_stays():
    own = torch.ones(2)
    assert send(own, torch.device("cpu")) is own  # nothing to do
    assert send(own, torch.device("cpu"), copy=True) is not own


def test_a_device_gets_its_number():
    with Accelerator():
        assert find_device("lazy") == torch.device("lazy", 0)
    assert find_device(None) is None


@pytest.mark.parametrize("name", ["meta", "vulkan", "gpu", "cuda:x", "cuda:99", "privateuseone", ""])
def test_why_a_device_cannot_be_used_is_said_shortly(name: str):
    with pytest.raises(
        UsageError, match=f"^device '{name}' cannot be used here: .+; give cpu, or leave it out$"
    ) as got:
        find_device(name)
    assert len(str(got.value)) < 200
    assert "\n" not in str(got.value)


# -- structure ---------------------------------------------------------------------------------------


class Tied(nn.Module):
    """With tied weights, a tensor that is no buffer, and a device of its own."""

    def __init__(self, device: str = "cpu", *, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out, self.again = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 8)
        self.to(device)
        if tied:  # here, since what goes to an emulated device comes apart on the way
            self.again.weight = self.into.weight
        self.mask, self.device = torch.arange(8.0).to(device), torch.zeros(0, device=device).device

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.again(self.out((self.into(x) * self.mask).relu()))
        return self.out(hidden.relu() + torch.zeros(8, device=self.device))


@pytest.mark.parametrize("build", [conv, Tied], ids=["conv", "tied"])
def test_a_model_on_the_device_has_the_structure_that_it_has_on_the_cpu(build):
    model, x = build(), X if build is conv else torch.ones(2, 4)
    here = weldnet.capture(model, x)
    with Accelerator() as device:
        there = build("lazy") if build is Tied else build().to("lazy")
        assert weldnet.capture(there, x.to("lazy")) == here
        assert weldnet.capture(there, x, route="export") == weldnet.capture(model, x, route="export")
        assert weldnet.check(there, x.to("lazy"), here) == weldnet.check(model, x, here)
        assert weldnet.power(there, x.to("lazy"), here) == weldnet.power(model, x, here)
        assert is_far(there)
    assert device.there == 0  # the CPU's operations are the same everywhere


def test_tensors_and_devices_that_a_module_holds_go_along():
    """Also those that ``Module.to`` leaves behind; the result's lie where the networks' do."""
    networks, x = [Tied(), Tied()], torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"data": x, "repair": "data", "check": False, "progress": False}
    here = weldnet.fuse(networks, x[:1], **options)
    recipe, labelled = Recipe(epochs=1, batch_size=8), (x, torch.arange(16) % 4)
    trained = fine_tune(Tied(tied=False), labelled, recipe, progress=False)
    with Accelerator():
        there = weldnet.fuse(networks, x[:1], device="lazy", **options)
        again = fine_tune(Tied(tied=False), labelled, recipe, device="lazy", progress=False)
        assert is_far(weldnet.fuse([Tied("lazy"), Tied("lazy")], x[:1], **options).model)
    assert same_state(here.model, there.model)
    assert same_state(trained.model, again.model)
    for model in (there.model, again.model):
        assert torch.equal(model(x), copy.deepcopy(model)(x))  # all of it is on the CPU


class Stubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.ones(4, device="lazy")


def test_a_forward_pass_that_names_its_device_is_told_so():
    with Accelerator(), pytest.raises(ModelError, match="let the forward pass take devices from its inputs"):
        weldnet.capture(Stubborn().to("lazy"), torch.ones(1, 4, device="lazy"))


# -- alignment ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CHOSEN, ids=repr)
@pytest.mark.parametrize("case", ["conv", "attention"])
def test_alignment_is_done_on_the_device(case, method):
    networks, x = [conv(seed) for seed in range(3)], X
    if case == "attention":
        networks, x = [NETWORKS[case].model(seed) for seed in range(2)], NETWORKS[case].example()
    structure = weldnet.capture(networks[0], x)
    here = weldnet.align(networks, structure, method=method)
    with Accelerator() as device:
        there = weldnet.align(networks, structure, method=method, device="lazy")
    assert device.there > 0
    assert device.here == 0
    assert same_alignment(here, there)


@pytest.mark.parametrize("lying", [False, True], ids=["asked", "lying"])
@pytest.mark.parametrize("method", [*WATCHING, "auto"], ids=repr)
def test_methods_that_look_at_data_run_on_the_device(method, lying):
    """Where it is asked for, and where networks and inputs are there already; the networks stay where they are."""
    networks = [conv(seed) for seed in range(3)]
    structure = weldnet.capture(networks[0], X)
    here = weldnet.align(networks, structure, method=method, data=DATA)
    with Accelerator() as device:
        if lying:
            moved = far(networks)
            there = weldnet.align(moved, structure, method=method, data=DATA.to("lazy"))
            assert all(map(is_far, moved))
        else:
            there = weldnet.align(networks, structure, method=method, data=DATA, device="lazy")
    assert device.there > 0
    assert device.here == 0
    assert same_alignment(here, there)


@pytest.mark.parametrize("method", ["weight_matching", "activation_matching", "optimal_transport"])
def test_networks_may_lie_on_different_devices(method):
    a, b = conv(0), conv(1)
    structure = weldnet.capture(a, X)
    data = DATA if method == "activation_matching" else None
    here = weldnet.align([a, b], structure, method=method, data=data)
    with Accelerator():
        assert same_alignment(here, weldnet.align([a, *far([b])], structure, method=method, data=data))
        assert same_alignment(here, weldnet.align([*far([a]), b], structure, method=method, data=data))


def test_networks_of_other_widths_are_aligned_and_folded_on_the_device():
    wide, narrow = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3)), nn.Sequential()
    narrow = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.ones(1, 4)
    options: dict[str, Any] = {"method": "optimal_transport", "repair": "none", "progress": False}
    fused, folded = weldnet.fuse([narrow, wide], x, **options), weldnet.fold(wide, narrow, x)
    with Accelerator():
        assert same_state(weldnet.fuse([narrow, wide], x, device="lazy", **options).model, fused.model)
        assert same_state(weldnet.fold(wide, narrow, x, device="lazy"), folded)
        (there,) = far([wide])
        assert same_state(weldnet.fold(there, narrow, x), folded)
        assert is_far(weldnet.fold(wide, *far([narrow]), x))


class Hungry(nn.Module):
    """Runs out of memory on more than two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.linear(x)


def test_a_full_device_is_not_taken_for_inputs_that_do_not_fit():
    x, options = torch.randn(8, 4), {"repair": "data", "check": False, "progress": False}
    with pytest.raises(torch.OutOfMemoryError):
        weldnet.evaluate(Hungry(), (x, torch.arange(8) % 4))
    with pytest.raises(torch.OutOfMemoryError):
        weldnet.fuse([Hungry(), Hungry()], x[:1], data=x, **options)


class Listed(nn.Module):
    """Holds tensors that nothing brings along."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.masks = nn.Linear(4, 4), [torch.ones(4)]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.masks[0]


def test_tensors_left_behind_are_not_taken_for_inputs_that_do_not_fit():
    x = torch.randn(8, 4)
    words = "Listed lies on lazy:0 and holds tensors elsewhere .*; register them as buffers"
    with Accelerator():
        with pytest.raises(ModelError, match=words):
            weldnet.evaluate(Listed(), (x, torch.arange(8) % 4), device="lazy")
        with pytest.raises(ModelError, match=words):
            run(Listed().to("lazy"), x)
    with pytest.raises(DataError, match=r"shape \(8, 3\) do not fit Listed, whose first weight 'linear.weight' has"):
        run(Listed(), x[:, :3])


# -- fusion ------------------------------------------------------------------------------------------


def test_fusing_and_streaming_align_on_the_device(tmp_path):
    networks = {f"n{seed}": conv(seed) for seed in range(2)}
    files: dict[str, Path] = {}
    for name, network in networks.items():
        files[name] = tmp_path / f"{name}.safetensors"
        save(network.state_dict(), files[name])
    options: dict[str, Any] = {"method": "weight_matching", "check": False, "progress": False}
    here = weldnet.fuse(networks, X, repair="none", **options).state_dict()
    with Accelerator() as device:
        there = weldnet.fuse(networks, X, repair="none", device="lazy", **options).state_dict()
    with Accelerator() as streaming:
        stream = weldnet.fuse_files(files, X, model=conv, out=tmp_path / "out", device="lazy", **options)
    assert device.there > 0
    assert streaming.there > 0
    for key, tensor in weldnet.load(stream.path).items():
        assert torch.equal(tensor, here[key]), key
        assert torch.equal(there[key], here[key]), key


REPAIRED = [
    *(name for name in REPAIRS if name != "synthetic"),
    "refit+calibrate",
    Rescale(shift=True),
    Synthetic(count=64, steps=2),
]


@pytest.mark.parametrize("lying", [False, True], ids=["asked", "lying"])
@pytest.mark.parametrize("repair", REPAIRED, ids=repr)
def test_a_fusion_with_repair_and_scores_runs_on_the_device(repair, lying):
    """The result lies where the networks do, and only the capture is left to the CPU."""
    networks = [conv(seed) for seed in range(2)]
    options: dict[str, Any] = {"method": "weight_matching", "repair": repair, "check": False, "progress": False}
    here = weldnet.fuse(networks, X, data=DATA, evaluate_on=(DATA, LABELS), **options)
    with Accelerator() as capturing:
        weldnet.capture(networks[0], X)
    with Accelerator() as device:
        if lying:
            x, data, labels = X.to("lazy"), DATA.to("lazy"), LABELS.to("lazy")
            there = weldnet.fuse(far(networks), x, data=data, evaluate_on=(data, labels), **options)
            assert is_far(there.model)
        else:
            there = weldnet.fuse(networks, X, data=DATA, evaluate_on=(DATA, LABELS), device="lazy", **options)
            assert not any(isinstance(tensor, Far) for tensor in there.state_dict().values())
        assert same_state(here.model, there.model)
    assert device.here == capturing.here
    assert there.report.rows == here.report.rows
    assert there.report.repair == here.report.repair
    assert there.parents == here.parents


@pytest.mark.parametrize("options", [{"check": True}, {"size": 1.5}, {"method": Gamf(activations=1.0)}], ids=repr)
def test_proofs_sizes_and_data_go_together_with_the_device(options):
    networks = [conv(seed) for seed in range(2)]
    options = {"method": "weight_matching", "data": DATA, "repair": "refit", "progress": False, **options}
    here = weldnet.fuse(networks, X, **options)
    with Accelerator():
        there = weldnet.fuse(networks, X, device="lazy", **options)
        assert same_state(there.model, here.model)
        assert same_state(weldnet.fuse(far(networks), X, **options).model, here.model)
    assert [row.equivalence for row in there.report.rows] == [row.equivalence for row in here.report.rows]


def test_a_function_that_judges_gets_networks_where_they_were_given():
    where: set[str] = set()

    def judge(network: nn.Module) -> float:
        where.update(tensor.device.type for tensor in network.state_dict().values())
        return float(network(X).sum().detach())

    with Accelerator():
        options: dict[str, Any] = {"evaluate_on": judge, "device": "lazy", "progress": False}
        weldnet.fuse([conv(0), conv(1)], X, repair="none", **options)
        weldnet.compare([conv(0), conv(1)], X, methods=["identity"], repairs=["none"], points=0, **options)
        weldnet.barrier(conv(0), conv(1), evaluate=judge, points=2, device="lazy")
        plane(conv(0), conv(1), conv(2), evaluate=judge, points=2, device="lazy")
    assert where == {"cpu"}


def test_a_comparison_runs_on_the_device():
    networks = [conv(seed) for seed in range(2)]
    options: dict[str, Any] = {
        "methods": ["weight_matching", "activation_matching"],
        "repairs": ["none", "refit"],
        "data": DATA,
        "evaluate_on": (DATA, LABELS),
        "points": 3,
        "check": False,
        "progress": False,
    }
    here = weldnet.compare(networks, X, **options)
    with Accelerator() as capturing:
        weldnet.capture(networks[0], X)
    with Accelerator() as device:
        there = weldnet.compare(networks, X, device="lazy", **options)
    assert device.here == capturing.here
    assert there.references == here.references
    for a, b in zip(there.rows, here.rows, strict=True):
        assert not a.error
        assert (a.method, a.repair, a.scores, a.barrier) == (b.method, b.repair, b.scores, b.barrier)


# -- scores ------------------------------------------------------------------------------------------


def test_scores_are_computed_on_the_device():
    net, labels = conv(0), torch.zeros(8, dtype=torch.int64)
    data = (torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)), labels)
    here = weldnet.evaluate(net, data)
    with Accelerator() as device:
        there = weldnet.evaluate(net, data, device="lazy")
        curve = weldnet.barrier(net, conv(1), evaluate=data, points=3, device="lazy")
    assert device.here == 0
    assert device.there > 0
    assert there == here
    assert curve == weldnet.barrier(net, conv(1), evaluate=data, points=3)
    assert all(not isinstance(tensor, Far) for tensor in net.state_dict().values())


def test_a_plane_is_computed_on_the_device():
    networks = [conv(seed) for seed in range(3)]
    here = plane(*networks, evaluate=(DATA, LABELS), points=2)
    with Accelerator() as device:
        assert plane(*networks, evaluate=(DATA, LABELS), points=2, device="lazy") == here
        assert plane(*far(networks), evaluate=(DATA.to("lazy"), LABELS.to("lazy")), points=2) == here
    assert device.here == 0
