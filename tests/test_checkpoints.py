"""Checkpoints: what is read is what was written, what is wrong is named, and nothing is left half done."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from weldnet import checkpoints
from weldnet.checkpoints import (
    SUFFIXES,
    atomic_path,
    check_writable,
    file_sha256,
    load,
    load_into,
    match_keys,
    match_model,
    match_states,
    provenance,
    read_metadata,
    save,
    validate_finite,
)
from weldnet.errors import CheckpointError, UsageError

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]


def _state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "fc1.weight": torch.randn(4, 3, generator=generator),
        "fc1.bias": torch.randn(4, generator=generator),
        "fc2.weight": torch.randn(2, 4, generator=generator),
        "fc2.bias": torch.randn(2, generator=generator),
    }


def _model() -> nn.Module:
    return nn.Sequential(OrderedDict(fc1=nn.Linear(3, 4), act=nn.ReLU(), fc2=nn.Linear(4, 2)))


def _assert_equal(a, b) -> None:
    assert set(a) == set(b)
    for key in a:
        assert a[key].dtype == b[key].dtype
        assert torch.equal(a[key], b[key]), key


def _names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def _fails(match: str, call, *args, **kwargs) -> str:
    with pytest.raises(CheckpointError, match=match) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


# --- reading back what was written ---


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, suffix, dtype):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(5, 3, generator=generator) * 50
    state = {
        "a": values.abs().to(dtype),
        "scalar": values[0, 0].abs().to(dtype),
        "none": torch.empty(0, 2).to(dtype),
    }
    save(state, tmp_path / f"net{suffix}")
    _assert_equal(load(tmp_path / f"net{suffix}"), state)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_not_a_number_and_infinity_survive_the_round_trip(tmp_path, suffix):
    values = torch.tensor([float("nan"), float("inf"), -0.0])
    save({"a": values}, tmp_path / f"net{suffix}")
    assert torch.equal(load(tmp_path / f"net{suffix}")["a"].view(torch.int32), values.view(torch.int32))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_aliases_views_and_conjugates_are_written_as_their_values(tmp_path, suffix):
    whole = torch.arange(12.0).reshape(3, 4)
    state = {
        "whole": whole,
        "tied": whole,
        "row": whole[1],
        "columns": whole[:, 1:3],
        "turned": whole.T,
        "parameter": nn.Parameter(whole[:2]),
        "conjugate": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
    }
    save(state, tmp_path / f"net{suffix}")
    loaded = load(tmp_path / f"net{suffix}")
    _assert_equal(loaded, {key: value.detach() for key, value in state.items()})
    assert not any(tensor.requires_grad for tensor in loaded.values())
    assert state["tied"] is whole


def test_a_view_does_not_drag_its_whole_storage_into_the_file(tmp_path):
    save({"a": torch.zeros(100_000)[:4]}, tmp_path / "net.pt")
    assert (tmp_path / "net.pt").stat().st_size < 10_000


@pytest.mark.parametrize("name", ["net.pt", "net.pth", "net.bin", "net.ckpt"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_torch_extension_and_format_is_read(tmp_path, name, zipped):
    torch.save(_state(), tmp_path / name, _use_new_zipfile_serialization=zipped)
    _assert_equal(load(tmp_path / name), _state())


def test_a_safetensors_file_of_another_tool_is_read(tmp_path):
    save_file(_state(), tmp_path / "net.safetensors")
    _assert_equal(load(str(tmp_path / "net.safetensors")), _state())


def test_tensors_tied_in_a_torch_file_stay_tied(tmp_path):
    weight = torch.randn(3, 3)
    torch.save({"a": weight, "b": weight}, tmp_path / "net.pt")
    loaded = load(tmp_path / "net.pt")
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()


def test_a_loaded_file_can_be_saved_over_itself(tmp_path):
    for suffix in SUFFIXES:
        path = tmp_path / f"net{suffix}"
        save(_state(), path)
        loaded = load(path)
        loaded["fc1.bias"] += 1
        save(loaded, path)
        _assert_equal(load(path), {**_state(), "fc1.bias": _state()["fc1.bias"] + 1})


def test_an_unknown_device_is_a_usage_error(tmp_path):
    save(_state(), tmp_path / "net.pt")
    with pytest.raises(UsageError, match="device 'abacus'"):
        load(tmp_path / "net.pt", device="abacus")


# --- wrappers and prefixes ---


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_training_checkpoints_are_unwrapped(tmp_path, wrapper):
    content = {"epoch": 3, wrapper: _state(), "optimizer": {"lr": 0.1}, "best": 0.9}
    torch.save(content, tmp_path / "net.pt")
    _assert_equal(load(tmp_path / "net.pt"), _state())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_wrapper_prefixes_are_stripped_when_every_key_has_them(tmp_path, prefix, suffix):
    save({prefix + key: value for key, value in _state().items()}, tmp_path / f"net{suffix}")
    _assert_equal(load(tmp_path / f"net{suffix}"), _state())


@pytest.mark.parametrize("keys", [("module.a", "b"), ("model.a", "model.b"), ("module.",), ("modules.a",)])
def test_other_prefixes_stay(tmp_path, keys):
    save({key: torch.ones(1) for key in keys}, tmp_path / "net.safetensors")
    assert set(load(tmp_path / "net.safetensors")) == set(keys)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([torch.ones(1)], "holds a list, not a state dict"),
        (torch.ones(1), "holds a Tensor, not a state dict"),
        ({"a": torch.ones(1), "epoch": 3}, "'epoch' of type int"),
        ({0: torch.ones(1)}, "'0' of type Tensor"),
        ({"state_dict": {"a": torch.ones(1), "b": "text"}}, "'state_dict' holds 'b' of type str"),
        ({"state_dict": _state(), "model": _state()}, "several state dicts"),
        ({"generator": _state(), "critic": _state()}, "'generator' of type dict"),
        ({}, "holds no tensors"),
        ({"state_dict": {}}, "holds no tensors"),
        ({"a": torch.eye(2).to_sparse()}, "sparse"),
        ({"a": torch.ones(2, device="meta")}, "without data"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content, match):
    torch.save(content, tmp_path / "net.pt")
    assert "net.pt" in _fails(match, load, tmp_path / "net.pt")


# --- files that cannot be read ---


@pytest.mark.parametrize("read", [load, read_metadata, file_sha256])
def test_paths_that_lead_nowhere_are_named(tmp_path, read):
    _fails("nothing.pt': no such file", read, tmp_path / "nothing.pt")
    _fails("the folder holds no checkpoint", read, tmp_path)
    (tmp_path / "net.onnx").write_bytes(b"x")
    _fails("net.onnx': unknown extension '.onnx'", read, tmp_path / "net.onnx")
    (tmp_path / "file").write_bytes(b"x")
    _fails("no such file", read, tmp_path / "file" / "net.pt")
    _fails(r"net\\n.pt': no such file", read, tmp_path / "net\n.pt")
    _fails("cannot be read|no such file", read, "x" * 300 + ".pt")
    _fails("no such file|cannot be read", read, "net\0.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_empty_files_are_named(tmp_path, suffix):
    (tmp_path / f"net{suffix}").touch()
    _fails(f"net{suffix}': the file is empty", load, tmp_path / f"net{suffix}")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "net.pt")
    _fails("not a regular file", load, tmp_path / "net.pt")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
def test_files_cut_short_are_named(tmp_path, suffix, share):
    path = tmp_path / f"net{suffix}"
    save(_state(), path)
    content = path.read_bytes()
    path.write_bytes(content[: max(1, int(len(content) * share))])
    _fails(f"net{suffix}': damaged, cut short", load, path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "content",
    [b"not a checkpoint at all", b"\0" * 4096, b"\xff" * 4096, b"PK\x03\x04" + b"x" * 100, b"\x80\x02."],
)
def test_files_of_rubbish_are_named(tmp_path, suffix, content):
    (tmp_path / f"net{suffix}").write_bytes(content)
    _fails(f"net{suffix}': ", load, tmp_path / f"net{suffix}")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_flipped_bytes_give_a_checkpoint_error_or_a_state(tmp_path, zipped):
    path = tmp_path / "net.pt"
    torch.save(_state(), path, _use_new_zipfile_serialization=zipped)
    content = bytearray(path.read_bytes())
    for position in range(0, len(content), max(1, len(content) // 150)):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            load(path)
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either outcome is right


def test_a_git_lfs_pointer_is_recognised(tmp_path):
    (tmp_path / "net.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    _fails("git lfs pull", load, tmp_path / "net.safetensors")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_protected_file_is_named(tmp_path):
    save(_state(), tmp_path / "net.pt")
    (tmp_path / "net.pt").chmod(0)
    _fails("cannot be read: Permission denied", load, tmp_path / "net.pt")


# --- pickles that run code ---


class _Malicious:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return (os.system, (f"touch {self.victim}",))


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain", "plain protocol 0", "plain protocol 2"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, form):
    victim, path = tmp_path / "executed", tmp_path / "net.pt"
    content = {"state_dict": {"a": torch.ones(1)}, "extra": _Malicious(victim)}
    if form.startswith("plain"):
        protocol = int(form[-1]) if form[-1].isdigit() else pickle.DEFAULT_PROTOCOL
        path.write_bytes(pickle.dumps(_Malicious(victim), protocol=protocol))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    assert "posix.system" in _fails("would have to run code", load, path) or sys.platform == "win32"
    assert not victim.exists()


@pytest.mark.parametrize("module", [nn.Linear(2, 2), _Net()], ids=["builtin", "own class"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore")
def test_a_whole_pickled_module_is_recognised(tmp_path, module, zipped):
    torch.save(module, tmp_path / "net.pt", _use_new_zipfile_serialization=zipped)
    _fails(r"whole pickled module .*save model.state_dict\(\)", load, tmp_path / "net.pt")


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_is_recognised(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "net.pt"))
    _fails("TorchScript", load, tmp_path / "net.pt")


# --- folders and shards ---


def _shards(folder: Path, suffix: str = ".safetensors", index: str = "model.safetensors.index.json") -> Path:
    state = _state()
    for number, layer in enumerate(("fc1", "fc2")):
        part = {key: value for key, value in state.items() if key.startswith(layer)}
        save(part, folder / f"part-{number}{suffix}", metadata={f"part{number}": layer})
    weight_map = {key: f"part-{0 if key.startswith('fc1') else 1}{suffix}" for key in state}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder / index


def _edit_index(index: Path, **weight_map: object) -> None:
    content = json.loads(index.read_text())
    content["weight_map"].update({key.replace("__", "."): value for key, value in weight_map.items()})
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("suffix", "name"),
    [(".safetensors", "model.safetensors.index.json"), (".bin", "pytorch_model.bin.index.json")],
)
def test_a_sharded_checkpoint_is_read_by_its_index_or_folder(tmp_path, suffix, name):
    index = _shards(tmp_path, suffix, name)
    _assert_equal(load(index), _state())
    _assert_equal(load(tmp_path), _state())
    assert file_sha256(index) == file_sha256(tmp_path)


def test_a_folder_means_its_one_checkpoint_the_known_name_first(tmp_path):
    save(_state(0), tmp_path / "epoch.pt")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / ".hidden.pt").write_bytes(b"x")
    _assert_equal(load(tmp_path), _state(0))
    save(_state(1), tmp_path / "other.pt")
    _fails("2 checkpoints .'epoch.pt', 'other.pt'", load, tmp_path)
    save(_state(2), tmp_path / "pytorch_model.bin")
    _assert_equal(load(tmp_path), _state(2))
    save(_state(3), tmp_path / "model.safetensors")
    _assert_equal(load(tmp_path), _state(3))
    _shards(tmp_path)
    _fails("both model.safetensors and a sharded index", load, tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    index = _shards(tmp_path)
    (tmp_path / "part-1.safetensors").unlink()
    message = _fails("'part-1.safetensors', which is missing", load, index)
    assert index.name in message


def test_a_key_missing_from_its_shard_is_named(tmp_path):
    index = _shards(tmp_path)
    _edit_index(index, fc3__weight="part-0.safetensors")
    _fails("part-0.safetensors': lacks 1 tensor .*'fc3.weight'", load, index)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/secret.safetensors", "a/../../secret.safetensors"])
@pytest.mark.parametrize("slash", ["/", "\\"])
def test_a_shard_outside_the_folder_is_refused(tmp_path, name, slash):
    save({"fc1.weight": torch.ones(1)}, tmp_path / "secret.safetensors")
    (tmp_path / "inner").mkdir()
    index = _shards(tmp_path / "inner")
    _edit_index(index, fc1__weight=name.replace("/", slash))
    _fails("outside its folder", load, index)


def test_a_shard_in_a_subfolder_is_read(tmp_path):
    index = _shards(tmp_path)
    save({"deep": torch.ones(1)}, tmp_path / "sub" / "part.safetensors")
    _edit_index(index, deep="sub/part.safetensors")
    assert "deep" in load(index)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "needs a 'weight_map'"),
        (b'{"weight_map": {}}', "needs a 'weight_map'"),
        (b'{"weight_map": {"a": 3}}', "needs a 'weight_map'"),
        (b'{"weight_map": {"a": ""}}', "outside its folder"),
        (b'{"weight_map": {"a": "model.safetensors.index.json"}}', "not a checkpoint file"),
        (b'{"weight_map": {"a": "sub"}}', "not a checkpoint file"),
        (b"", "is empty"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, content, match):
    (tmp_path / "sub").mkdir()
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    _fails(match, load, tmp_path / "model.safetensors.index.json")


# --- metadata, fingerprints, provenance ---


def test_metadata_are_read_back(tmp_path):
    save(_state(), tmp_path / "net.safetensors", metadata={"note": "größer\nthan"})
    assert read_metadata(tmp_path / "net.safetensors") == {"format": "pt", "note": "größer\nthan"}
    save(_state(), tmp_path / "net.pt", metadata={"note": "lost"})
    assert read_metadata(tmp_path / "net.pt") == {}
    save_file(_state(), tmp_path / "bare.safetensors")
    assert read_metadata(tmp_path / "bare.safetensors") == {}
    (tmp_path / "bare.safetensors").write_bytes(b"rubbish")
    _fails("damaged", read_metadata, tmp_path / "bare.safetensors")


def test_metadata_of_shards_are_merged(tmp_path):
    assert read_metadata(_shards(tmp_path)) == {"format": "pt", "part0": "fc1", "part1": "fc2"}


def test_the_fingerprint_is_that_of_the_bytes(tmp_path):
    save(_state(), tmp_path / "net.pt")
    expected = hashlib.sha256((tmp_path / "net.pt").read_bytes()).hexdigest()
    assert file_sha256(tmp_path / "net.pt") == expected
    (tmp_path / "sharded").mkdir()
    index = _shards(tmp_path / "sharded")
    parts = [(index.parent / f"part-{i}.safetensors").read_bytes() for i in (0, 1)]
    assert file_sha256(index) == hashlib.sha256(b"".join(parts)).hexdigest()


def test_provenance_is_text_that_a_file_carries(tmp_path):
    save(_state(0), tmp_path / "a.pt")
    (tmp_path / "b").mkdir()
    save(_state(1), tmp_path / "b" / "model.safetensors")
    origin = provenance([tmp_path / "a.pt", tmp_path / "b"], {"z": 1, "a": Path("x"), "m": {"k": None}}, 7)
    assert json.loads(origin["parents"]) == [
        {"file": "a.pt", "sha256": file_sha256(tmp_path / "a.pt")},
        {"file": "b", "sha256": file_sha256(tmp_path / "b")},
    ]
    assert origin["config"] == '{"a":"x","m":{"k":null},"z":1}'
    assert (origin["seed"], origin["format"]) == ("7", "pt")
    assert {"weldnet_version", "torch_version", "python_version"} <= set(origin)
    save(_state(), tmp_path / "fused.safetensors", metadata=origin)
    assert read_metadata(tmp_path / "fused.safetensors") == origin


@pytest.mark.parametrize("config", [{"a": object()}, {"a": float("nan")}, {"a": {1, 2}}, {1: 1, "a": 1}])
def test_a_config_without_a_canonical_form_is_a_usage_error(config):
    with pytest.raises(UsageError, match="config cannot be kept"):
        provenance([], config, 0)


def test_provenance_of_a_missing_parent_fails(tmp_path):
    _fails("no such file", provenance, [tmp_path / "a.pt"], {}, 0)


# --- numbers, keys and shapes ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_counted(dtype, value):
    state = {"ok": torch.ones(3), "bad": torch.ones(2, 5).to(dtype), "worse": torch.full((2,), value)}
    state["bad"][0, :3] = value
    message = _fails("NaN or infinite", validate_finite, state, "site1")
    assert message.startswith("'site1': 3 of 10 values of 'bad' (and 1 more tensor)")


def test_finite_values_pass():
    state = {str(dtype): torch.ones(2).to(dtype) for dtype in (*DTYPES, torch.float8_e4m3fn, torch.complex64)}
    validate_finite({**state, "empty": torch.empty(0)}, "net")


def test_states_of_one_architecture_match():
    match_states({})
    match_states({"a": _state()})
    match_states({"a": _state(0), "b": _state(1), "c": {k: v.double() for k, v in _state(2).items()}})


def test_missing_and_extra_keys_are_named():
    other = _state()
    del other["fc1.bias"]
    other["fc3.bias"] = torch.ones(1)
    for match in (match_keys, match_states):
        message = _fails("'b' lacks 1 key of 'a' .'fc1.bias'", match, {"a": _state(), "ok": _state(), "b": other})
        assert "has 1 key that 'a' lacks ('fc3.bias')" in message


def test_many_keys_are_counted():
    first = {f"k{i}": torch.ones(1) for i in range(20)}
    second = {f"k{i}": torch.ones(1) for i in range(13)}
    _fails("lacks 7 keys of 'a' .'k13', 'k14', 'k15' and 4 more", match_states, {"a": first, "b": second})


def test_mis_shaped_keys_are_named_with_both_shapes():
    wide = {**_state(), "fc1.weight": torch.ones(8, 3), "fc1.bias": torch.ones(8)}
    message = _fails("2 tensors of another shape", match_states, {"a": _state(), "b": wide})
    assert "'fc1.weight' is (8, 3) in 'b' but (4, 3) in 'a'" in message
    match_keys({"a": _state(), "b": wide})


def test_different_architectures_are_said_in_one_line():
    other = {f"layer{i}.weight": torch.ones(1) for i in range(50)}
    _fails("'b' and 'a' are different architectures: 0 keys", match_states, {"a": _state(), "b": other})
    _fails("'net.pt' and the model are different architectures", match_model, other, _model(), "net.pt")
    _fails("different architectures", match_states, {"a": _state(), "b": {}})


def test_a_state_that_does_not_fit_leaves_the_model_alone():
    model, before = _model(), {k: v.clone() for k, v in _model().state_dict().items()}
    model.load_state_dict(before)
    state = _state()
    for bad, match in [
        ({k: v for k, v in state.items() if k != "fc1.bias"}, "lacks 1 key of the model .'fc1.bias'"),
        ({**state, "fc9": torch.ones(1)}, "'net' has 1 key that the model lacks"),
        ({**state, "fc2.bias": torch.ones(3)}, r"is \(3,\) in 'net' but \(2,\) in the model"),
        (
            {**state, "fc2.bias": torch.ones(2, dtype=torch.int64)},
            "is torch.int64 but torch.float32 in the model",
        ),
    ]:
        _fails(match, load_into, model, bad, "net")
        _assert_equal(model.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_model_takes_the_dtype_of_the_state(dtype):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[0].bias.requires_grad_(False)
    state = {k: v.to(dtype) if v.is_floating_point() else v + 5 for k, v in model.state_dict().items()}
    state = {k: v.clone() for k, v in state.items()}
    kept = {k: v.clone() for k, v in state.items()}
    load_into(model, state, "net")
    _assert_equal(model.state_dict(), state)
    assert model[0].weight.requires_grad
    assert not model[0].bias.requires_grad
    with torch.no_grad():
        model[0].weight.zero_()
    _assert_equal(state, kept)
    if dtype in (torch.float32, torch.float64):
        model(torch.randn(5, 3, dtype=dtype)).sum().backward()


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_tensors_stay_tied_and_one_of_them_is_enough():
    weight = torch.randn(5, 3, dtype=torch.float64)
    for state in (
        {"embedding.weight": weight},
        {"head.weight": weight},
        {"embedding.weight": weight, "head.weight": weight.clone()},
    ):
        model = _Tied()
        load_into(model, state, "net")
        assert model.head.weight is model.embedding.weight
        assert torch.equal(model.head.weight, weight)
    untied = {"embedding.weight": weight, "head.weight": weight + 1}
    _fails("one tensor in the model", load_into, _Tied(), untied, "net")
    _fails("lacks 1 key|different architectures", load_into, _Tied(), {}, "net")


def test_a_model_that_was_never_run_is_named():
    _fails("run it once", match_model, _state(), nn.Sequential(nn.LazyLinear(3)), "net")


# --- writing: whole or not at all ---


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("exists", [True, False], ids=["over a file", "new"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("writer failed"), KeyboardInterrupt()],
    ids=["disk full", "writer", "interrupt"],
)
def test_a_save_that_fails_half_way_leaves_everything_as_it_was(tmp_path, monkeypatch, suffix, exists, error):
    path = tmp_path / ("" if exists else "new/folder") / f"net{suffix}"
    if exists:
        path.write_bytes(b"before")
    before = _names(tmp_path)

    def half(state, file, *_args, **_kwargs):
        file.write(b"half") if hasattr(file, "write") else Path(file).write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", half)
    monkeypatch.setattr("weldnet.checkpoints._save.save_file", half)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError
    with pytest.raises(expected) as caught:
        save(_state(), path)
    if expected is CheckpointError:
        assert f"net{suffix}': cannot be written: {getattr(error, 'strerror', None) or error}" in str(caught.value)
    assert _names(tmp_path) == before
    assert not exists or path.read_bytes() == b"before"


@pytest.mark.skipif(sys.platform == "win32", reason="needs file size limits")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_disk_that_fills_up_leaves_everything_as_it_was(tmp_path, suffix):
    import resource

    path = tmp_path / f"net{suffix}"
    path.write_bytes(b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        _fails("cannot be written: .*File too large", save, {"a": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert _names(tmp_path) == [path.name]
    assert path.read_bytes() == b"before"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_at_the_very_end_leaves_everything_as_it_was(tmp_path, monkeypatch, step):
    (tmp_path / "net.pt").write_bytes(b"before")

    def fail(*_args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, step, fail)
    _fails("cannot be written: Input/output error", save, _state(), tmp_path / "net.pt")
    assert _names(tmp_path) == ["net.pt"]
    assert (tmp_path / "net.pt").read_bytes() == b"before"


@pytest.mark.parametrize(
    ("state", "metadata", "match"),
    [
        ({}, None, "empty"),
        ({"a": 3}, None, "'a' is no tensor"),
        ({3: torch.ones(1)}, None, "'3' is no tensor"),
        ({"a": torch.ones(1, device="meta")}, None, "no tensor with data"),
        ({"a": torch.ones(1)}, {"seed": 3}, "metadata 'seed' is not text"),
        ({"a": torch.ones(1, dtype=torch.complex128)}, None, "the format has no torch.complex128; use .pt"),
    ],
)
def test_what_is_no_state_is_not_written(tmp_path, state, metadata, match):
    _fails(match, save, state, tmp_path / "net.safetensors", metadata=metadata)
    assert _names(tmp_path) == []


def _unwritable(folder: Path) -> list[tuple[Path, str]]:
    (folder / "file").write_bytes(b"x")
    (folder / "directory.pt").mkdir()
    (folder / "loop.pt").symlink_to("loop.pt")
    places = [
        (folder / "file" / "net.pt", "cannot be written"),
        (folder / "file" / "deep" / "net.pt", "cannot be written"),
        (folder / "directory.pt", "it is a folder"),
        (folder / ("x" * 300 + ".pt"), "name"),
        (folder / "nul\0.pt", "null"),
        (folder / "loop.pt", "cannot be written"),
    ]
    if sys.platform == "linux":
        places.append((Path("/proc/weldnet.pt"), "cannot be written"))
    if hasattr(os, "geteuid") and os.geteuid() != 0:
        (folder / "locked").mkdir(mode=0o500)
        (folder / "readonly.pt").write_bytes(b"x")
        (folder / "readonly.pt").chmod(0o400)
        places += [(folder / "locked" / "net.pt", "Permission"), (folder / "readonly.pt", "read-only")]
    return places


@pytest.mark.parametrize("write", [check_writable, lambda path: save(_state(), path)], ids=["check", "save"])
def test_places_that_cannot_be_written_are_named(tmp_path, write):
    places = _unwritable(tmp_path)
    before = _names(tmp_path)
    for path, match in places:
        _fails(match, write, path)
    assert _names(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs named pipes")
def test_a_device_or_pipe_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for write in (check_writable, lambda path: save(_state(), path)):
        _fails("not a regular file", write, tmp_path / "pipe.pt")
    assert (tmp_path / "pipe.pt").is_fifo()


def test_unknown_output_extensions_are_refused(tmp_path):
    _fails("cannot write the extension '.onnx'", save, _state(), tmp_path / "net.onnx")
    _fails("cannot write the extension ''", check_writable, tmp_path / "net", suffixes=SUFFIXES)
    check_writable(tmp_path / "report.html")
    assert _names(tmp_path) == []


def test_checking_leaves_nothing_and_changes_nothing(tmp_path):
    (tmp_path / "old.pt").write_bytes(b"before")
    check_writable(tmp_path / "old.pt", suffixes=SUFFIXES)
    check_writable(tmp_path / "new" / "folder" / "net.pt")
    assert _names(tmp_path) == ["old.pt"]
    assert (tmp_path / "old.pt").read_bytes() == b"before"


def test_missing_folders_are_made(tmp_path):
    save(_state(), tmp_path / "new" / "folder" / "net.pt")
    _assert_equal(load(tmp_path / "new" / "folder" / "net.pt"), _state())


def test_relative_paths_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_writable("net.pt")
    save(_state(), "net.pt")
    assert _names(tmp_path) == ["net.pt"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX permissions")
def test_permissions_follow_the_umask_or_the_old_file(tmp_path):
    path = tmp_path / "net.safetensors"
    mask = os.umask(0o027)
    try:
        save(_state(), path)
        assert path.stat().st_mode & 0o777 == 0o640
        path.chmod(0o604)
        save(_state(), path)
        assert path.stat().st_mode & 0o777 == 0o604
    finally:
        os.umask(mask)


def test_a_link_is_followed_not_replaced(tmp_path):
    save(_state(0), tmp_path / "real.pt")
    (tmp_path / "link.pt").symlink_to("real.pt")
    save(_state(1), tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink()
    _assert_equal(load(tmp_path / "real.pt"), _state(1))


def test_other_writers_are_atomic_too(tmp_path):
    with atomic_path(tmp_path / "a" / "report.json") as temporary:
        temporary.write_text("{}")
        assert not (tmp_path / "a" / "report.json").exists()
    assert _names(tmp_path) == ["a", "a/report.json"]
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "b" / "report.json") as temporary:
        temporary.write_text(str(1 // 0))
    assert _names(tmp_path) == ["a", "a/report.json"]


def test_an_os_error_about_another_file_passes_through(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "out"):
        (tmp_path / "input").read_text()
    assert _names(tmp_path) == []


def test_all_names_exist():
    assert all(hasattr(checkpoints, name) for name in checkpoints.__all__)


def test_one_prefix_of_all_keys_is_found():
    model = nn.Sequential(nn.Linear(2, 2))
    state = {key: value.detach() for key, value in model.state_dict().items()}
    assert checkpoints.match_prefix(state, model)[1:] == ("", "")
    renamed, stripped, added = checkpoints.match_prefix({f"a.b.{key}": value for key, value in state.items()}, model)
    assert (renamed.keys(), stripped, added) == (state.keys(), "a.b.", "")
    renamed, stripped, added = checkpoints.match_prefix({key[2:]: value for key, value in state.items()}, model)
    assert (renamed.keys(), stripped, added) == (state.keys(), "", "0.")


def test_a_prefix_of_some_keys_is_no_match_but_a_hint():
    model = nn.Linear(2, 2)
    state = {f"net.{key}": value.detach() for key, value in model.state_dict().items()}
    state["loss.weight"] = torch.ones(2)
    assert checkpoints.match_prefix(state, model) == (state, "", "")
    assert "'net.' 2 of its 3 keys" in checkpoints.prefix_hint(state, model)
    assert checkpoints.prefix_hint({"other": torch.ones(1)}, model) == ""
