"""Folders of the transformers library, by path and without a factory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import weldnet
from weldnet.cli import _pretrained, main

INPUT = "input_ids=1,16:int64<50;attention_mask=1,16:int64=1"
SIZES = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture
def cli(capfd):
    """Run a command line; give its exit code, stdout and stderr, whichever way they were written."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def gpt(tmp_path, monkeypatch, transformers):
    """Make folders of small GPT-2 networks in the current folder."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, seed: int = 0, **changes: Any) -> str:
        torch.manual_seed(seed)
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**SIZES, **changes})).save_pretrained(name)
        return name

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield make


def test_two_folders_become_a_third(cli, gpt, transformers):
    a, b = gpt("a"), gpt("b", 1)
    Path("a/tokenizer.json").write_text("{}")
    for left_out in ("README.md", "training_args.bin", "modeling.py"):
        Path("a", left_out).write_text("x")
    code, out, err = cli("fuse", a, b, "-o", "fused", "--input", INPUT)
    assert (code, err) == (0, "weldnet: wrote fused\n")
    files = {path.name for path in Path("fused").iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "weldnet.json", "config.yaml"}
    assert not files & {"training_args.bin", "modeling.py"}
    card = Path("fused/README.md").read_text()  # of the fused network, not a parent's
    assert "library_name: weldnet" in card
    assert "transformers.GPT2LMHeadModel.from_pretrained" in card
    assert {path.name for path in Path().iterdir()} == {"a", "b", "fused"}
    record = json.loads(Path("fused/weldnet.json").read_text())
    assert [parent["file"] for parent in record["parents"]] == ["a", "b"]

    load = transformers.GPT2LMHeadModel.from_pretrained
    fused, info = load("fused", output_loading_info=True)
    assert not any(info.values())
    x = {"input_ids": torch.arange(16)[None], "attention_mask": torch.ones(1, 16, dtype=torch.int64)}
    expected = weldnet.fuse({"a": load("a").eval(), "b": load("b").eval()}, x, progress=False).model
    assert fused.state_dict().keys() == expected.state_dict().keys()
    torch.testing.assert_close(dict(fused.state_dict()), dict(expected.state_dict()))
    assert "a  " in out


def test_the_networks_own_example_is_the_input_where_none_is_given(cli, gpt):
    a, b = gpt("a"), gpt("b", 1)
    code, out, err = cli("check", a, b)
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()] == [["a", "passed:"], ["b", "passed:"]]
    assert err == "weldnet: note: no --input is given; the network's own example is used (input_ids 3x5)\n"
    for arguments in ([a], ["--model", a]):
        code, out, _ = cli("inspect", *arguments)
        assert code == 0
        assert "tied: lm_head.weight is transformer.wte.weight" in out


def test_pictures_are_an_example_too(cli, tmp_path, monkeypatch, transformers):
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
    transformers.ViTForImageClassification(config).save_pretrained("vit", max_shard_size="8KB")
    assert Path("vit/model.safetensors.index.json").exists()
    code, out, err = cli("inspect", "vit", "--svg", "vit.svg")
    assert code == 0
    assert "pixel_values 1x3x16x16" in err
    assert "space 'vit." in out
    assert "patch_embeddings" in Path("vit.svg").read_text()


def test_a_folder_is_a_model_for_files(cli, gpt):
    a, b = gpt("a"), gpt("b", 1)
    one = cli("fuse", a, b, "-o", "one.safetensors", "--input", INPUT)
    two = cli("fuse", "a/model.safetensors", "b/model.safetensors", "-o", "two.pt", "--model", a, "--input", INPUT)
    assert (one[0], two[0]) == (0, 0)
    first, second = load_file("one.safetensors"), weldnet.load("two.pt")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_precision_is_that_of_the_files(cli, gpt, transformers):
    for name, seed in (("a", 0), ("b", 1)):
        gpt(name, seed)
        transformers.GPT2LMHeadModel.from_pretrained(name).bfloat16().save_pretrained(name)
    assert cli("fuse", "a", "b", "-o", "fused", "--input", INPUT)[0] == 0
    assert {tensor.dtype for tensor in load_file("fused/model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_embd": 48}, "n_embd is 32 and 48"),
        ({"n_layer": 3}, "n_layer is 2 and 3"),
        ({"activation_function": "relu"}, "activation_function is 'gelu_new' and 'relu'"),
    ],
)
def test_different_configs_are_named(cli, gpt, changes, words):
    a, c = gpt("a"), gpt("c", **changes)
    code, out, err = cli("fuse", a, c, "-o", "fused")
    assert (code, out) == (1, "")
    assert f"'a' and 'c' are different networks: {words}; give networks of one architecture" in err
    assert err.count("\n") == 1
    assert not Path("fused").exists()


def test_different_configs_that_compute_the_same_are_no_matter(cli, gpt):
    a, b = gpt("a"), gpt("b", 1, resid_pdrop=0.3, initializer_range=0.1)
    assert cli("check", a, b)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["fuse", "a", "a.safetensors", "-o", "f"], 2, ["--model", "'a.safetensors'", "config.json"]),
        (["fuse", "a", "b", "-o", "b"], 2, ["'b'", "there already"]),
        (["fuse", "a.safetensors", "a.safetensors", "-o", "f.gz", "--model", "a"], 2, ["extension '.gz'"]),
        (["inspect", "empty"], 2, ["--model", "'empty'"]),
        (["inspect", "--model", "empty", "--input", "1,2"], 2, ["'empty'", "config.json"]),
        (["inspect", "--model", "a?x=1", "--input", "1,2"], 2, ["'a'", "takes no options"]),
        (["inspect", "foreign"], 1, ["'foreign'", "`nothing`"]),
        (["inspect", "unknown"], 1, ["no UnknownModel", "never run"]),
        (["inspect", "short"], 1, ["'short'", "lacks 1", "transformer.ln_f.weight"]),
        (["inspect", "broken"], 1, ["broken", "not a safetensors file"]),
        (["inspect", "bare"], 1, ["bare", "no checkpoint"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_folders_that_cannot_be_used(cli, gpt, arguments, code, words):
    a, _ = gpt("a"), gpt("b", 1)
    config = json.loads(Path(a, "config.json").read_text())
    state = load_file("a/model.safetensors")
    save_file(state, "a.safetensors")
    Path("empty").mkdir()
    for name, changes in {
        "foreign": {"model_type": "nothing"},
        "unknown": {"architectures": ["UnknownModel"]},
        "short": {},
        "broken": {},
        "bare": {},
    }.items():
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps({**config, **changes}))
    save_file(state, "foreign/model.safetensors")
    save_file(state, "unknown/model.safetensors")
    save_file({k: v for k, v in state.items() if k != "transformer.ln_f.weight"}, "short/model.safetensors")
    Path("broken/model.safetensors").write_bytes(b"garbage" * 10)
    before = sorted(map(str, Path().rglob("*")))
    found, out, err = cli(*arguments)
    assert (found, out) == (code, "")
    assert err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert sorted(map(str, Path().rglob("*"))) == before


def test_without_transformers_it_says_what_to_install(cli, gpt, monkeypatch):
    a = gpt("a")
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, out, err = cli("inspect", a)
    assert (code, out) == (1, "")
    assert "pip install transformers" in err
    assert err.count("\n") == 1


def test_a_folder_that_cannot_be_finished_is_not_left(cli, gpt, monkeypatch):
    a, b = gpt("a"), gpt("b", 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    Path(a, "tokenizer.json").write_text("{}")
    monkeypatch.setattr(_pretrained.shutil, "copyfile", full)
    code, out, err = cli("fuse", a, b, "-o", "fused", "--input", INPUT, "--report", "r.json")
    assert (code, out) == (1, "")
    assert "'fused': cannot be written" in err
    assert {path.name for path in Path().iterdir()} == {"a", "b"}


# -- a library that cannot be imported -------------------------------------------------------------


def unimportable(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    """Let a broken ``transformers`` be found before the installed one."""
    (folder / "broken").mkdir()
    (folder / "broken" / "transformers.py").write_text(text, encoding="utf-8")
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(folder / "broken"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", "operator torchvision::nms does not exist"),
        ("import no_such_part", "No module named 'no_such_part'"),
        (
            "try:\n    raise OSError('libfoo.so is missing')\nexcept OSError as e:\n"
            "    raise ImportError('no torch') from e",
            "no torch (OSError: libfoo.so is missing)",
        ),
    ],
)
def test_why_the_library_cannot_be_imported_is_said(cli, gpt, monkeypatch, tmp_path, text, words):
    folder = gpt("a")
    unimportable(monkeypatch, tmp_path, text)
    code, out, err = cli("inspect", folder)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert f"which is there but cannot be imported: {words}" in err
    assert "make python -c 'import transformers' work" in err
    assert "pip install" not in err


def test_a_missing_library_is_to_be_installed(cli, gpt, monkeypatch):
    folder = gpt("a")
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = cli("inspect", folder)
    assert code == 1
    assert "need transformers; pip install transformers" in err
