"""Fusing from disk to disk: the same network as in memory, whatever happens on the way."""

from __future__ import annotations

import errno
import json
import logging
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import weldnet
from networks import NETWORKS
from weldnet import models
from weldnet.alignment import Gamf, WeightMatching, Workspace
from weldnet.alignment._ascent import Ascent
from weldnet.alignment._rough import Rough
from weldnet.alignment._shelf import Spill
from weldnet.checkpoints import StoredState, _stored, plan_shards, read_metadata, save, shard_names, write_shard
from weldnet.cli import main
from weldnet.errors import CheckpointError, FusionError, ModelError, StructureError, UsageError
from weldnet.streaming import _fuse as streaming
from weldnet.streaming import _job as job
from weldnet.streaming._meter import Meter
from weldnet.streaming._unfinished import Unfinished
from weldnet.structure import StoredReferee, Structure, build_weightless

METHODS = [WeightMatching(), Gamf(gamma=0.4), Gamf(sigma=4.0, gamma=0.3), Gamf(gamma=0.4, precision="bfloat16")]
CHOSEN = (
    *("linear", "batch_norm", "grouped_twice", "group_norm", "tied_transposed", "two_names", "attention"),
    *("encoder_layer", "residual_downsample", "embedding"),
)
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(9))
IMAGE = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def nested() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2))


def parents(make: Any, count: int, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Any], dict]:
    """Make networks and write each as a file."""
    modules = {}
    for number in range(count):
        torch.manual_seed(number)
        modules[f"n{number}"] = make().to(dtype).eval()
    return modules, write(modules, folder)


def write(modules: dict[str, nn.Module], folder: Path) -> dict[str, Path]:
    files = {name: folder / f"{name}.safetensors" for name in modules}
    for name, module in modules.items():
        save(module.state_dict(), files[name])
    return files


def fused_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# -- the same as in memory -------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("name", CHOSEN)
def test_it_is_the_network_that_is_fused_in_memory(name, method, tmp_path):
    network = NETWORKS[name]
    x = network.example()
    modules = {f"n{seed}": network.model(seed) for seed in range(2)}
    files = write(modules, tmp_path)
    expected = weldnet.fuse(modules, x, method=method, repair="none", check=False, progress=False)
    found = weldnet.fuse_files(
        files,
        x,
        model=lambda: network.build().double(),
        out=tmp_path / "out",
        method=method,
        shard_size="2KB",
        progress=False,
    )
    state = weldnet.load(found.path)
    for key, tensor in state.items():
        assert torch.equal(tensor, expected.state_dict()[key]), key
    assert set(state) >= set(expected.structure.shapes) - set(expected.structure.aliases)
    assert found.structure.spaces == expected.structure.spaces
    assert found.report.check.startswith("passed")
    assert all(row.equivalence <= 1e-4 for row in found.report.rows if row.role == "parent")


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("held", [0, 1 << 29])
@pytest.mark.parametrize("case", ["perceptron", "nested"])
def test_many_networks_with_weights_of_their_own(case, held, method, tmp_path, monkeypatch):
    monkeypatch.setattr("weldnet.alignment._ascent._HELD", held)
    make, x = (perceptron, X) if case == "perceptron" else (nested, IMAGE)
    modules, files = parents(make, 4, tmp_path)
    options: dict[str, Any] = {"method": method, "weights": [0.4, 0.3, 0.2, 0.1], "progress": False}
    expected = weldnet.fuse(modules, x, repair="none", **options)
    found = weldnet.fuse_files(files, x, model=make, out=tmp_path / "out", **options)
    torch.testing.assert_close(weldnet.load(found.path), expected.state_dict(), rtol=0, atol=1e-6)
    assert found.report.objective == pytest.approx(expected.report.objective, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_type_of_the_files_is_kept(dtype, tmp_path):
    modules, files = parents(perceptron, 2, tmp_path, dtype)
    expected = weldnet.fuse(modules, X.to(dtype), repair="none", check=False, progress=False)
    found = weldnet.fuse_files(files, X, model=perceptron, out=tmp_path / "out", progress=False)
    state = weldnet.load(found.path)
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in state.items())


def test_counters_that_were_halved_with_the_weights_are_read_if_they_are_whole(tmp_path):
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    modules, files = parents(make, 2, tmp_path)
    for count, (name, module) in enumerate(modules.items(), start=2):
        module[1].num_batches_tracked.fill_(count)
        save({key: tensor.half() for key, tensor in module.state_dict().items()}, files[name])
        module.half()
    options: dict[str, Any] = {"method": "weight_matching", "progress": False}
    expected = weldnet.fuse(modules, X.half(), repair="none", check=False, **options)
    found = weldnet.load(weldnet.fuse_files(files, X, model=make, out=tmp_path / "fused", **options).path)
    assert found["1.num_batches_tracked"].dtype == torch.int64
    assert int(found["1.num_batches_tracked"]) == 3
    torch.testing.assert_close(found, dict(expected.state_dict()), rtol=0, atol=0)
    broken = weldnet.load(files["n1"])
    save({key: t + 0.5 if key.endswith("tracked") else t for key, t in broken.items()}, files["n1"])
    refused(CheckpointError, "is torch.float16 but torch.int64", files, tmp_path, model=make)


def test_tensors_are_read_one_place_at_a_time(tmp_path, monkeypatch):
    def deep() -> nn.Module:
        return nn.Sequential(*[layer for _ in range(12) for layer in (nn.Linear(64, 64), nn.ReLU())])

    _, files = parents(deep, 2, tmp_path)
    alive: list[weakref.ref[Tensor]] = []
    peak = 0
    read = _stored.read_tensor

    def counting(where: Any) -> Tensor:
        nonlocal peak
        tensor = read(where)
        alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(tensor)]
        peak = max(peak, sum(ref().nbytes for ref in alive))
        return tensor

    monkeypatch.setattr(_stored, "read_tensor", counting)
    options: dict[str, Any] = {"method": "weight_matching", "progress": False}
    weldnet.fuse_files(files, torch.zeros(1, 64), model=deep, out=tmp_path / "out", **options)
    assert peak <= 3 * 64 * 64 * 4


def test_many_networks_are_read_in_linear_time_and_one_at_a_time(tmp_path, monkeypatch):
    """Each space's visit reads every network a fixed number of times, and memory does not know how many there are."""

    def deep() -> nn.Module:
        return nn.Sequential(*[layer for _ in range(5) for layer in (nn.Linear(64, 64), nn.ReLU())])

    _, files = parents(deep, 12, tmp_path)
    monkeypatch.setattr("weldnet.alignment._shelf._KEPT", 3 * 64 * 64 * 4)  # the sums do not fit
    alive: list[weakref.ref[Tensor]] = []
    peaks, reads, read = {}, {}, _stored.read_tensor

    def counting(where: Any) -> Tensor:
        tensor = read(where)
        alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(tensor)]
        peaks[count] = max(peaks.get(count, 0), sum(ref().nbytes for ref in alive))
        reads[count] = reads.get(count, 0) + 1
        return tensor

    monkeypatch.setattr(_stored, "read_tensor", counting)
    options: dict[str, Any] = {"method": WeightMatching(sweeps=2), "check": False, "progress": False}
    for count in (3, 6, 12):
        chosen = dict(list(files.items())[:count])
        weldnet.fuse_files(chosen, torch.zeros(1, 64), model=deep, out=tmp_path / f"out{count}", **options)
    assert reads[12] - reads[6] <= 2.2 * (reads[6] - reads[3])
    assert peaks[12] == peaks[3] <= 3 * 64 * 64 * 4


def test_a_spill_holds_little_and_gives_back_everything(tmp_path):
    spill = Spill(tmp_path / "sums", kept=2 * 400)
    tensors = {number: torch.full((100,), float(number)) for number in range(5)}
    for number, tensor in tensors.items():
        spill[number] = tensor.clone()
    assert len(list((tmp_path / "sums").iterdir())) == 3
    spill[0] = spill[0].add_(7)  # from disk, changed, back to disk
    assert all(torch.equal(spill[number], tensors[number]) for number in (1, 2, 3, 4))
    assert torch.equal(spill[0], tensors[0] + 7)
    assert sorted(spill) == sorted(tensors)
    spill.clear()
    assert not (tmp_path / "sums").exists()
    with pytest.raises(KeyError):
        spill[0]


def test_couplings_that_are_replaced_leave_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr("weldnet.alignment._shelf._SMALL", 64)
    workspace = Workspace(tmp_path / "w")
    for value in range(4):
        workspace.couplings["s"] = torch.full((8, 8), float(value)) + torch.eye(8)
    workspace.keep("anneal", {})
    kept = workspace.couplings["s"].clone()
    for value in range(4):
        workspace.couplings["s"] = torch.full((8, 8), -float(value)) + torch.eye(8)
    assert len(list((tmp_path / "w").glob("whole-*"))) == 2  # what is in force, and the latest
    again = Workspace(tmp_path / "w")
    again.couplings["s"] = torch.eye(8)  # as a method starts before it goes on: no file in force is written over
    assert again.resume("anneal") is not None
    assert torch.equal(again.couplings["s"], kept)


# -- interrupted and gone on with ------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a signal: nobody catches it."""


def flat() -> nn.Module:
    """A net of spaces whose sums over the networks are kept from visit to visit."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1))


@pytest.mark.parametrize("method", [WeightMatching(), Gamf(gamma=0.5), Gamf(gamma=0.5, precision="bfloat16")], ids=repr)
@pytest.mark.parametrize("make", [nested, flat])
def test_going_on_gives_the_same_bytes(make, method, tmp_path, monkeypatch):
    _, files = parents(make, 3, tmp_path)
    monkeypatch.setattr("weldnet.alignment._shelf._SMALL", 64)  # couplings of a few units go to files too
    options: dict[str, Any] = {"method": method, "shard_size": 600, "check": False, "progress": False}
    whole = weldnet.fuse_files(files, IMAGE, model=make, out=tmp_path / "whole", **options)
    reads = count_reads(monkeypatch, None)
    weldnet.fuse_files(files, IMAGE, model=make, out=tmp_path / "again", **options)
    assert fused_bytes(tmp_path / "again") == fused_bytes(whole.path)
    places = range(3, reads[0], max(1, reads[0] // 7))
    assert len(places) > 5
    for number in places:
        out = tmp_path / f"killed{number}"
        count_reads(monkeypatch, number)
        with pytest.raises(Killed):
            weldnet.fuse_files(files, IMAGE, model=make, out=out, **options)
        assert not out.exists()
        count_reads(monkeypatch, None)
        weldnet.fuse_files(files, IMAGE, model=make, out=out, **options)
        assert fused_bytes(out) == fused_bytes(whole.path)
        assert not out.with_name(f"{out.name}.unfinished").exists()


def count_reads(monkeypatch: pytest.MonkeyPatch, limit: int | None) -> list[int]:
    """Count the tensors that are read; after some of them the process dies, if ``limit`` says so."""
    counts, read = [0], _stored.StoredState.__getitem__
    original = getattr(read, "original", read)

    def counting(state: StoredState, key: str) -> Tensor:
        counts[0] += 1
        if limit is not None and counts[0] > limit:
            raise Killed
        return original(state, key)

    counting.original = original  # pyright: ignore[reportFunctionMemberAccess]
    monkeypatch.setattr(_stored.StoredState, "__getitem__", counting)
    return counts


def test_the_check_of_rough_products_reads_nothing_again(tmp_path, monkeypatch):
    _, files = parents(flat, 2, tmp_path)
    monkeypatch.setattr(Rough, "is_near", lambda *_: True)
    harden, soft, reads = Ascent.harden, list[int](), [0]
    monkeypatch.setattr(Ascent, "harden", lambda ascent: (soft.append(reads[0]), harden(ascent)))
    counts: list[int] = []
    for precision in ("float32", "bfloat16"):
        soft.clear()
        reads = count_reads(monkeypatch, None)
        method = Gamf(gamma=0.5, sweeps=1, precision=precision)
        out = tmp_path / precision
        weldnet.fuse_files(files, IMAGE, model=flat, out=out, method=method, check=False, progress=False)
        counts += soft
    assert len(counts) == 2
    assert counts[0] == counts[1]


def test_finished_work_is_not_done_again(tmp_path, monkeypatch):
    _, files = parents(perceptron, 2, tmp_path)
    options: dict[str, Any] = {"model": perceptron, "out": tmp_path / "out", "shard_size": 300, "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(job, "write_index", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            weldnet.fuse_files(files, X, **options)
    shards = sorted((tmp_path / "out.unfinished" / "result").glob("*.safetensors"))
    times = [shard.stat().st_mtime_ns for shard in shards]
    monkeypatch.setattr(job, "Workspace", None)  # the alignment is found already
    weldnet.fuse_files(files, X, **options)
    assert len(shards) > 2
    assert times == [(tmp_path / "out" / shard.name).stat().st_mtime_ns for shard in shards]


# -- what is written -------------------------------------------------------------------------------


def test_the_result_says_where_it_comes_from(tmp_path):
    _, files = parents(perceptron, 2, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    found = weldnet.fuse_files(
        files, X, model=perceptron, out=tmp_path / "out", shard_size="600", progress=False,
        companions=[tmp_path / "tokenizer.json"],
    )  # fmt: skip
    index = json.loads((found.path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(perceptron().state_dict())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in perceptron().state_dict().values())
    record = json.loads((found.path / "weldnet.json").read_text())
    assert [parent["file"] for parent in record["parents"]] == ["n0.safetensors", "n1.safetensors"]
    assert record["config"]["method"].startswith("Gamf")
    assert json.loads(read_metadata(found.path)["config"]) == record["config"]
    assert (found.path / "tokenizer.json").read_text() == "{}"


def test_shards_are_full_but_for_the_last_and_large_tensors_stand_alone():
    entries = {str(i): (torch.float32, (size,)) for i, size in enumerate((2, 2, 1, 9, 1, 1))}
    assert plan_shards(entries, 16) == [["0", "1"], ["2"], ["3"], ["4", "5"]]
    assert shard_names(4)[0] == "model-00001-of-00004.safetensors"


# -- what cannot be meant --------------------------------------------------------------------------


def refused(kind: type[Exception], words: str, files: Any, tmp_path: Path, **options: Any) -> None:
    given: dict[str, Any] = {"model": perceptron, "out": tmp_path / "out", "progress": False, **options}
    with pytest.raises(kind) as caught:
        weldnet.fuse_files(files, X, **given)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_files_are_refused_by_name(tmp_path):
    modules, files = parents(perceptron, 2, tmp_path)
    good = files["n0"]
    state = modules["n1"].state_dict()

    def bad(name: str, **changes: Tensor) -> list[Path]:
        save_file({**state, **changes}, tmp_path / name)
        return [good, tmp_path / name]

    refused(CheckpointError, "no such file", [good, tmp_path / "none.safetensors"], tmp_path)
    refused(CheckpointError, "of another shape", bad("wide.safetensors", **{"0.bias": torch.zeros(17)}), tmp_path)
    refused(CheckpointError, "NaN", bad("nan.safetensors", **{"0.bias": torch.full((16,), torch.nan)}), tmp_path)
    refused(CheckpointError, "extra", bad("extra.safetensors", extra=torch.zeros(2)), tmp_path)
    torch.save(state, tmp_path / "old.pt")
    refused(CheckpointError, "only safetensors", [good, tmp_path / "old.pt"], tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-9])
    refused(CheckpointError, "cut short", [good, tmp_path / "cut.safetensors"], tmp_path)
    refused(UsageError, "two networks", [good], tmp_path)
    refused(UsageError, "optimal_transport", files, tmp_path, method="optimal_transport")
    refused(UsageError, "shard size", files, tmp_path, shard_size="many")
    refused(UsageError, "sum to", files, tmp_path, weights=[0.5, 0.6])


def test_a_type_without_a_name_is_refused(tmp_path):
    _, files = parents(perceptron, 2, tmp_path)
    content = files["n1"].read_bytes()
    assert content.count(b'"F32"') == 6
    files["n1"].write_bytes(content.replace(b'"F32"', b'"X32"'))
    refused(CheckpointError, "n1.safetensors", files, tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    _, files = parents(perceptron, 2, tmp_path)
    found = weldnet.fuse_files(files, X, model=perceptron, out=tmp_path / "c", shard_size=300, progress=False)
    lost = found.path / shard_names(len(list(found.path.glob("*.safetensors"))))[1]
    lost.unlink()
    refused(CheckpointError, lost.name, [files["n0"], found.path], tmp_path)


def test_a_full_disk_leaves_what_was_done(tmp_path, monkeypatch):
    _, files = parents(perceptron, 2, tmp_path)
    shards: list[Path] = []

    def full(path: Path, *rest: Any) -> None:
        if len(shards) == 2:
            raise CheckpointError(f"{str(path)!r}: cannot be written: No space left on device")
        shards.append(path)
        write_shard(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(job, "write_shard", full)
        refused(CheckpointError, "No space left", files, tmp_path, shard_size=300)
    assert all(shard.exists() for shard in shards)
    refused(CheckpointError, "shard_size", files, tmp_path, shard_size=400)
    refused(CheckpointError, "seed", files, tmp_path, shard_size=300, seed=1)
    weldnet.fuse_files(files, X, model=perceptron, out=tmp_path / "out", shard_size=300, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(streaming.shutil, "disk_usage", lambda folder: type("usage", (), {"free": 10}))
        with pytest.raises(CheckpointError, match="the disk has"):
            weldnet.fuse_files(files, X, model=perceptron, out=tmp_path / "other", progress=False)


@pytest.mark.parametrize("damage", ["{", "[1]", '{"tensors": "state-1.safetensors"}', '{"tensors": "none"}', "lost"])
def test_a_damaged_workspace_is_named(damage, tmp_path, monkeypatch):
    monkeypatch.setattr("weldnet.alignment._shelf._SMALL", 64)
    workspace = Workspace(tmp_path / "w")
    workspace.couplings["s"] = torch.eye(8)
    workspace.keep("hard", {"sweeps": 1})
    if damage == "lost":
        (tmp_path / "w" / "whole-1.safetensors").unlink()
    else:
        (tmp_path / "w" / "state.json").write_text(damage)
    with pytest.raises(CheckpointError, match="unfinished alignment") as caught:
        Workspace(tmp_path / "w")
    assert "\n" not in str(caught.value)


def interrupted(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Path:
    """Leave a fusion whose alignment is found and whose index is not written."""
    given: dict[str, Any] = {"model": perceptron, "shard_size": 300, "progress": False, **options}
    with monkeypatch.context() as patch:
        patch.setattr(job, "write_index", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            weldnet.fuse_files(files, X, out=tmp_path / "out", **given)
    return tmp_path / "out.unfinished"


def test_an_unfinished_fusion_of_something_else_is_not_gone_on_with(tmp_path, monkeypatch):
    def twisted() -> nn.Module:  # the first space can no longer be renumbered
        class Net(nn.Sequential):
            def forward(self, input: Tensor) -> Tensor:
                return super().forward(input) + self[0](input)[:, :3]

        return Net(*perceptron())

    _, files = parents(perceptron, 2, tmp_path)
    interrupted(files, tmp_path, monkeypatch)
    turned = dict(reversed(files.items()))
    refused(CheckpointError, "networks", turned, tmp_path, shard_size=300)
    refused(CheckpointError, "model", files, tmp_path, shard_size=300, model=twisted)
    monkeypatch.setattr("test_streaming.X", X[:2])
    refused(CheckpointError, "example input", files, tmp_path, shard_size=300)
    monkeypatch.undo()
    weldnet.fuse_files(files, X, model=perceptron, out=tmp_path / "out", shard_size=300, progress=False)


def test_the_first_difference_to_an_unfinished_fusion_is_named(tmp_path, monkeypatch):
    modules, files = parents(perceptron, 2, tmp_path)
    interrupted(files, tmp_path, monkeypatch, precision="bfloat16")
    given: dict[str, Any] = {"shard_size": 300, "precision": "bfloat16"}
    refused(CheckpointError, "and precision is bfloat16 there and float32 here", files, tmp_path, shard_size=300)
    refused(CheckpointError, "method is gamf there and identity here", files, tmp_path, method="identity")
    refused(CheckpointError, "weights: n0 is 0.5 there and 0.25 here", files, tmp_path, weights=[0.25, 0.75], **given)
    content, dates = files["n1"].read_bytes(), files["n1"].stat()
    os.utime(files["n1"], ns=(dates.st_atime_ns, dates.st_mtime_ns + 10**9))
    refused(CheckpointError, "the date of the file", files, tmp_path, **given)
    files["n1"].write_bytes(content)
    save({name: tensor.double() for name, tensor in modules["n1"].state_dict().items()}, files["n1"])
    refused(CheckpointError, "n1.safetensors' has changed since: it had ", files, tmp_path, **given)
    turned = {"n0": files["n0"], "n1": tmp_path / ("long" * 30 + ".safetensors")}
    turned["n1"].write_bytes(content)
    refused(CheckpointError, "n1.safetensors there and ", turned, tmp_path, **given)


def test_a_kept_shard_that_is_damaged_is_written_again(tmp_path, monkeypatch, capsys):
    _, files = parents(perceptron, 2, tmp_path)
    options: dict[str, Any] = {"model": perceptron, "shard_size": 300}
    whole = weldnet.fuse_files(files, X, out=tmp_path / "whole", progress=False, **options)
    first, second, *_ = sorted((interrupted(files, tmp_path, monkeypatch) / "result").glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-5])
    second.write_bytes(sorted(whole.path.glob("*.safetensors"))[0].read_bytes())
    capsys.readouterr()
    found = weldnet.fuse_files(files, X, out=tmp_path / "out", **options)
    assert fused_bytes(found.path) == fused_bytes(whole.path)
    assert capsys.readouterr().err.startswith(f"weldnet: going on with {tmp_path / 'out'}.unfinished\n")


def test_a_log_has_a_line_a_step_and_one_every_half_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("weldnet.streaming._meter.time.monotonic", lambda: now[0])
    meter = Meter()
    meter.step("align")
    for sweep in range(100):
        meter.begin(f"sweep {sweep + 1}", 10)
        now[0] += 1
        meter.read(5)
    assert [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "weldnet: align",
        *(f"weldnet: align: sweep {sweep}" for sweep in (30, 60, 90)),
    ]


def test_an_input_that_does_not_fit_prints_no_traceback(tmp_path):
    _, files = parents(perceptron, 2, tmp_path)
    log, said = logging.getLogger("torch._subclasses.fake_tensor"), list[logging.LogRecord]()
    handler = logging.Handler()
    handler.emit = said.append
    log.addHandler(handler)
    try:
        with pytest.raises(ModelError, match="reduction dim"):
            weldnet.fuse_files(files, X[:, :5], model=perceptron, out=tmp_path / "out", progress=False)
    finally:
        log.removeHandler(handler)
    assert not said
    assert not log.disabled


def test_a_proof_made_on_another_model_does_not_count(tmp_path, monkeypatch):
    """Of the same structure: the proof would say that it passed, and nobody made it."""
    _, files = parents(perceptron, 2, tmp_path)
    interrupted(files, tmp_path, monkeypatch)

    def smooth():
        return nn.Sequential(*(nn.GELU() if isinstance(m, nn.ReLU) else m for m in perceptron()))

    refused(CheckpointError, "model", files, tmp_path, shard_size=300, model=smooth)


def test_an_example_input_without_values_will_do_where_nothing_is_checked(tmp_path):
    _, files = parents(perceptron, 2, tmp_path)
    options = {"model": perceptron, "check": False, "progress": False}
    empty = weldnet.fuse_files(files, X.to("meta"), out=tmp_path / "empty", **options)
    full = weldnet.fuse_files(files, X, out=tmp_path / "full", **options)
    expected = weldnet.load(full.path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weldnet.load(empty.path).items())


def test_settings_of_a_fusion_that_found_nothing_out_do_not_bind(tmp_path):
    modules, files = parents(perceptron, 2, tmp_path)
    good = files["n1"].read_bytes()
    save({**modules["n1"].state_dict(), "0.bias": torch.full((16,), torch.nan)}, files["n1"])
    refused(CheckpointError, "NaN", files, tmp_path)
    files["n1"].write_bytes(good)
    weldnet.fuse_files(files, X, model=perceptron, out=tmp_path / "out", seed=3, progress=False)


def test_what_a_killed_process_was_writing_is_removed(tmp_path, monkeypatch):
    _, files = parents(perceptron, 2, tmp_path)
    unfinished = interrupted(files, tmp_path, monkeypatch)
    (unfinished / "result" / ".weldnet-0123456789abcdef.tmp").write_bytes(b"half a shard")
    found = weldnet.fuse_files(files, X, model=perceptron, out=tmp_path / "out", shard_size=300, progress=False)
    assert not list(found.path.glob(".*"))
    assert set(weldnet.load(found.path)) == set(perceptron().state_dict())


@pytest.mark.parametrize("damage", ["{", "[1]", "3"])
def test_damaged_facts_are_named(damage, tmp_path, monkeypatch):
    _, files = parents(perceptron, 2, tmp_path)
    (interrupted(files, tmp_path, monkeypatch) / "facts.json").write_text(damage)
    refused(CheckpointError, "remove its folder", files, tmp_path, shard_size=300)


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    _, files = parents(perceptron, 2, tmp_path)
    assert weldnet.fuse_files(files, X, model=perceptron, out=tmp_path / "out", progress=False).path.is_dir()


def test_two_processes_do_not_write_one_output(tmp_path):
    _, files = parents(perceptron, 2, tmp_path)
    with Unfinished(tmp_path / "out", {}).opened():
        refused(CheckpointError, "another process", files, tmp_path)


def test_integers_without_an_average_are_refused_before_the_work(tmp_path, monkeypatch):
    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(*perceptron())
            self.register_buffer("order", torch.randperm(5))

    _, files = parents(Net, 2, tmp_path)
    monkeypatch.setattr(job, "Workspace", None)
    refused(FusionError, "order", files, tmp_path, model=Net, check=False)


def test_a_parent_that_was_fused_itself_does_not_say_where_the_result_comes_from(tmp_path):
    _, files = parents(perceptron, 2, tmp_path)
    (tmp_path / "weldnet.json").write_text('{"parents": "others"}')
    found = weldnet.fuse_files(
        files, X, model=perceptron, out=tmp_path / "out", progress=False, companions=[tmp_path / "weldnet.json"]
    )
    assert len(json.loads((found.path / "weldnet.json").read_text())["parents"]) == 2


def test_a_parameter_of_two_names_stays_one_without_weights():
    def tied() -> nn.Module:
        net, weight = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Parameter(torch.randn(4, 4))
        net[0].weight, net[1].weight = weight, weight
        return net

    net = build_weightless(tied)
    assert net[0].weight is net[1].weight
    assert net[0].weight.is_meta


# -- the proof -------------------------------------------------------------------------------------


def test_weights_from_disk_prove_as_those_in_memory_do(tmp_path):
    modules, files = parents(perceptron, 1, tmp_path)
    structure = weldnet.capture(modules["n0"], X)
    model, state = build_weightless(perceptron), StoredState(files["n0"])
    assert all(p.is_meta for p in model.parameters())
    referee = StoredReferee(model, X, structure, state.__getitem__)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert referee.error({"0": order}) < 1e-12
    wrong = Structure(
        structure.spaces, structure.places[1:], structure.frozen, structure.shapes
    )  # the first place is forgotten
    assert StoredReferee(model, X, wrong, state.__getitem__).error({"0": order}) > 1e-3


def test_a_structure_that_does_not_hold_stops_the_fusion(tmp_path, monkeypatch):
    modules, files = parents(perceptron, 2, tmp_path)
    right = weldnet.capture(modules["n0"], X)
    wrong = Structure(right.spaces, right.places[1:], right.frozen, right.shapes)
    monkeypatch.setattr(streaming, "capture", lambda *_, **__: wrong)
    refused(StructureError, "answers otherwise", files, tmp_path)


# -- the command line ------------------------------------------------------------------------------


def test_what_averaging_breaks_is_said(tmp_path):
    def normed() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    for make, expected in ((normed, True), (perceptron, False)):
        folder = tmp_path / str(expected)
        folder.mkdir()
        _, files = parents(make, 2, folder)
        files["again"] = files["n1"]
        result = weldnet.fuse_files(files, X, model=make, out=folder / "out", method="identity", progress=False)
        said = "\n".join(result.report.notes)
        assert ("BatchNorm statistics, which are only averaged here" in said) == expected
        assert "'again' has the very weights of 'n1'" in said
        assert "not measured" in said


def test_the_command_line_streams(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for name in "ab":
        save(models.build("mlp", sizes=(64, 12, 10)).state_dict(), f"{name}.safetensors")
    base = ["fuse", "a.safetensors", "b.safetensors", "--model", "mlp?sizes=64,12,10", "--input", "1,1,8,8"]
    for extra in (["--data", "digits"], ["--size", "1.5"], ["--repair", "weights"], ["--into", "b"], ["--spaces"]):
        assert main([*base, "-o", "out", "--stream", *extra]) == 2
        assert "needs the networks in memory" in capsys.readouterr().err
    assert main([*base, "-o", "out.safetensors", "--shard-size", "1KB"]) == 2
    assert main([*base, "-o", "out.safetensors", "--stream"]) == 2
    assert main([*base, "--stream"]) == 2
    assert "fusing needs -o OUT" in capsys.readouterr().err
    capsys.readouterr()
    assert main([*base, "-o", "out", "--stream", "--shard-size", "1KB", "--report", "r.md", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["output"] == "out"
    assert "weldnet: align\n" in said.err
    assert "weights read from disk" in Path("r.md").read_text()
    assert "weldnet.load" in Path("out/README.md").read_text()
    assert "stream: true" in Path("out/config.yaml").read_text()
    assert main([*base, "-o", "fused.safetensors", "--repair", "none"]) == 0
    expected = weldnet.load("fused.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weldnet.load("out").items())
    assert main([*base, "-o", "out", "--stream"]) == 2
    assert "is there already" in capsys.readouterr().err
