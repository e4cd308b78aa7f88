"""The command line: what it prints, writes and returns."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import nn

import weldnet
from weldnet import checkpoints
from weldnet.cli import main
from weldnet.cli._common import parse_options
from weldnet.cli._input import make_input
from weldnet.cli._model import build_model
from weldnet.cli._networks import name_files
from weldnet.errors import UsageError

MODEL = "mlp?sizes=64,12,10"
BASE = ("--model", MODEL, "--input", "1,1,8,8")
COMMANDS = (
    "demo",
    "fuse",
    "compare",
    "fold",
    "inspect",
    "check",
    "evaluate",
    "barrier",
    "plane",
    "train",
    "federate",
    "finetune",
    "distil",
)


@pytest.fixture
def cli(capsys):
    """Run a command line in this process; give its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def pair(tmp_path, monkeypatch) -> tuple[Path, Path]:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        checkpoints.save(build_model(MODEL, seed=seed).state_dict(), tmp_path / f"{name}.safetensors")
    return Path("a.safetensors"), Path("b.safetensors")


# -- the program itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS)], ids=str)
def test_help_imports_nothing_heavy(arguments):
    script = (
        "import sys\nfrom weldnet.cli import main\n"
        f"code = main({arguments!r})\n"
        "heavy = {'torch', 'numpy', 'scipy', 'pydantic', 'yaml', 'safetensors', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_every_command_is_listed(cli):
    code, out, err = cli("--help")
    assert (code, err) == (0, "")
    assert all(command in out for command in COMMANDS)


def test_version(cli):
    assert cli("--version") == (0, f"weldnet {weldnet.__version__}\n", "")


def test_the_console_script_is_installed(tmp_path):
    script = Path(sys.executable).with_name("weldnet")
    done = subprocess.run([script, "fuse"], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("weldnet: error: ")


def test_without_a_command_it_shows_help_and_is_wrong_usage(cli):
    code, out, err = cli()
    assert code == 2
    assert "Usage" in out + err


@pytest.mark.parametrize("place", [0, 1, -1])
def test_debug_shows_the_traceback_wherever_it_stands(cli, pair, place):
    arguments = ["check", "nothing.pt", *BASE]
    arguments.insert(place if place >= 0 else len(arguments), "--debug")
    code, _, err = cli(*arguments)
    assert code == 1
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("weldnet: error: ")


def test_a_closed_pipe_is_silent(pair):
    script = f"import sys; from weldnet.cli import main; sys.exit(main({['inspect', *BASE]!r}))"
    command = f'{sys.executable} -c "$SCRIPT" | true'
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, env={**os.environ, "SCRIPT": script}
    )
    assert done.stderr == ""


def test_an_unexpected_error_is_one_line_with_its_type(cli, pair, monkeypatch):
    monkeypatch.setattr("weldnet.structure.capture", lambda *_, **__: 1 / 0)
    code, out, err = cli("inspect", *BASE)
    assert (code, out) == (1, "")
    assert err == (
        "weldnet: error: ZeroDivisionError: division by zero; "
        "this is unexpected, use --debug to see where it comes from\n"
    )


# -- fuse --------------------------------------------------------------------------------------------


def test_fuse_writes_what_the_library_gives(cli, pair):
    arguments = ("--data", "digits", "--seed", 3, "--repair", "none")
    code, out, err = cli("fuse", *pair, "-o", "fused.safetensors", *BASE, *arguments)
    assert code == 0, err
    assert "fused" in out
    assert "naive" in out
    assert err.splitlines()[0] == (
        "weldnet: data: digits, 360 test images; pixels normalised as (x/16 - mean)/std with mean 0.3053, std 0.3761"
    )
    assert err.splitlines()[-1] == "weldnet: wrote fused.safetensors"
    networks = {}
    for file in pair:
        networks[file.stem] = build_model(MODEL)
        networks[file.stem].load_state_dict(checkpoints.load(file))
    expected = weldnet.fuse(networks, torch.zeros(1, 1, 8, 8), seed=3, progress=False).state_dict()
    written = checkpoints.load("fused.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)


def test_fuse_records_where_the_result_comes_from(cli, pair):
    assert cli("fuse", *pair, "-o", "fused.safetensors", *BASE, "--weights", ".25,.75")[0] == 0
    metadata = checkpoints.read_metadata("fused.safetensors")
    parents = json.loads(metadata["parents"])
    assert [parent["file"] for parent in parents] == ["a.safetensors", "b.safetensors"]
    assert parents[0]["sha256"] == checkpoints.file_sha256(pair[0])
    assert json.loads(metadata["config"])["weights"] == {"a": 0.25, "b": 0.75}


def test_fuse_prints_one_json_document(cli, pair):
    code, out, _ = cli("fuse", *pair, "-o", "fused.pt", *BASE, "--json", "--method", "identity")
    document = json.loads(out)
    assert code == 0
    assert [row["role"] for row in document["rows"]] == ["parent", "parent", "naive", "fused"]
    assert document["output"] == "fused.pt"
    assert document["networks"] == ["a.safetensors", "b.safetensors"]


def test_fuse_writes_reports_and_the_alignment(cli, pair):
    for suffix, beginning in (
        (".html", "<!doctype html>"),
        (".json", "{"),
        (".md", "# Fusion of a and b"),
        (".csv", "origin,"),
    ):
        code, _, err = cli("fuse", *pair, "-o", "out/f.pt", *BASE, "--report", f"out/r{suffix}")
        assert code == 0, err
        assert Path(f"out/r{suffix}").read_text().startswith(beginning)
    assert cli("fuse", *pair, "-o", "out/f.pt", *BASE, "--alignment-out", "out/al.safetensors")[0] == 0
    assert weldnet.Alignment.load("out/al.safetensors")["b"].keys() == {"layers.0"}


def test_fuse_notes_that_a_file_is_given_twice(cli, pair):
    shutil.copy(pair[0], "copy.safetensors")
    for other, name in ((pair[0], "a#2"), ("copy.safetensors", "copy")):
        code, out, err = cli("fuse", pair[0], other, "-o", "f.pt", *BASE)
        assert code == 0, err
        assert f"note       '{name}' has the very weights of 'a': one network counts twice in the average." in out
    assert "very weights" not in cli("fuse", *pair, "-o", "f.pt", *BASE)[1]


def test_what_was_there_is_replaced_and_that_is_said(cli, pair):
    for end in ("wrote f.pt", "wrote f.pt, in place of what was there"):
        assert cli("fuse", *pair, "-o", "f.pt", *BASE)[2].splitlines()[-1] == f"weldnet: {end}"


def test_counters_that_were_halved_with_the_weights_are_read_if_they_are_whole(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = "vgg11?width=0.1&batch_norm=true&image_size=32"
    for seed, name in enumerate("ab"):
        network = build_model(model, seed=seed)
        network(torch.randn(4, 3, 32, 32))
        checkpoints.save({key: t.half() for key, t in network.state_dict().items()}, f"{name}.safetensors")
    arguments = ("fuse", "a.safetensors", "b.safetensors", "-o", "f.pt", "--model", model, "--input", "1,3,32,32")
    assert cli(*arguments)[0] == 0
    fused = checkpoints.load("f.pt")
    counters = [tensor for key, tensor in fused.items() if key.endswith("num_batches_tracked")]
    assert counters
    assert all(tensor.dtype == torch.int64 and int(tensor) == 1 for tensor in counters)
    broken = {k: t + 0.5 if k.endswith("tracked") else t for k, t in checkpoints.load("b.safetensors").items()}
    checkpoints.save(broken, "b.safetensors")
    code, _, err = cli(*arguments)
    assert code == 1
    assert "is torch.float16 but torch.int64 in the model" in err


def test_the_help_of_fuse_shows_defaults_and_what_is_required(cli):
    shown = " ".join(cli("fuse", "--help")[1].replace("│", " ").split())
    for default in ("gamf", "equal", "auto", "512", "1.0", "--check", "0"):
        assert f"(default: {default})" in shown
    assert shown.count("(required)") == 1
    for words in ("must sum to 1", ".ckpt", "normalised by weldnet", "evaluate_on=", "path/to/file.py:factory"):
        assert words in shown


def test_fuse_takes_many_networks_in_many_formats(cli, pair):
    torch.save({"state_dict": build_model(MODEL, seed=2).state_dict()}, "c.pth")
    torch.save({f"module.{k}": v for k, v in build_model(MODEL, seed=3).state_dict().items()}, "d.bin")
    code, out, err = cli("fuse", *pair, "c.pth", "d.bin", "-o", "f.safetensors", *BASE, "--json")
    assert code == 0, err
    assert [row["name"] for row in json.loads(out)["rows"]][:4] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_fuse_keeps_the_precision_of_its_parents(cli, pair, dtype):
    for file in pair:
        checkpoints.save({k: v.to(dtype) for k, v in checkpoints.load(file).items()}, file)
    code, _, err = cli("fuse", *pair, "-o", "fused.safetensors", *BASE, "--data", "digits")
    assert code == 0, err
    assert {t.dtype for t in checkpoints.load("fused.safetensors").values()} == {dtype}


def test_fuse_mixes_precisions(cli, pair):
    checkpoints.save({k: v.bfloat16() for k, v in checkpoints.load(pair[1]).items()}, pair[1])
    code, _, err = cli("fuse", *pair, "-o", "fused.safetensors", *BASE, "--data", "digits")
    assert code == 0, err


def test_fuse_passes_options_to_the_method(cli, pair):
    arguments = ("fuse", *pair, "-o", "f.pt", *BASE, "--json", "--option", "sigma=4", "--option", "tau=0.5")
    code, out, err = cli(*arguments)
    assert code == 0, err
    assert "sigma=4" in json.loads(out)["method"]


def test_repair_uses_unlabelled_training_images(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))\n"
    )
    for seed, name in enumerate("ab"):
        checkpoints.save(build_model("net.py:make", seed=seed).state_dict(), f"{name}.pt")
    arguments = ("fuse", "a.pt", "b.pt", "-o", "f.pt", "--model", "net:make", "--input", "2,1,8,8", "--json")
    for repair, says in (("data", "64 unlabelled inputs"), ("refit", "64 unlabelled inputs"), ("auto", "16 held-back")):
        code, out, err = cli(*arguments, "--data", "digits", "--samples", 64, "--repair", repair)
        assert code == 0, err
        assert says in json.loads(out)["repair"]


# -- config ------------------------------------------------------------------------------------------


def test_config_gives_what_the_command_line_does_not(cli, pair):
    settings = {
        "networks": ["a.safetensors", "b.safetensors"],
        "output": "from-config.pt",
        "model": MODEL,
        "input": "1,1,8,8",
        "weights": [0.2, 0.8],
        "method": "gamf",
        "options": {"sigma": 4, "tau": 0.4},
    }
    Path("fuse.yaml").write_text(yaml.safe_dump(settings))
    code, out, err = cli("fuse", "--config", "fuse.yaml", "--weights", ".5,.5", "--option", "tau=0.5", "--print-config")
    assert (code, err) == (0, "")
    printed = yaml.safe_load(out)
    assert printed["weights"] == [0.5, 0.5]
    assert printed["options"] == {"sigma": 4, "tau": 0.5}
    assert printed["output"] == "from-config.pt"
    assert not Path("from-config.pt").exists()
    assert cli("fuse", "--config", "fuse.yaml")[0] == 0
    assert Path("from-config.pt").exists()


def test_a_printed_config_is_a_config(cli, pair):
    _, first, _ = cli("fuse", *pair, "-o", "f.pt", *BASE, "--no-check", "--option", "sigma=inf", "--print-config")
    assert yaml.safe_load(first)["options"] == {"sigma": float("inf")}
    Path("again.yaml").write_text(first)
    assert cli("fuse", "--config", "again.yaml", "--print-config") == (0, first, "")


# -- the reading commands ----------------------------------------------------------------------------


def test_inspect(cli, pair):
    code, out, err = cli("inspect", *BASE, pair[0])
    assert (code, err) == (0, "")
    assert "space 'layers.0': 12 units" in out
    _, out, _ = cli("inspect", *BASE, "--json")
    assert len(weldnet.Structure.from_json(out).spaces) == 1


def test_inspect_folds_unless_all_is_asked_for(cli):
    deep = ("inspect", "--model", "mlp?sizes=64,12,12,12,12,10", "--input", "1,64")
    _, short, _ = cli(*deep)
    _, full, _ = cli(*deep, "--full")
    assert "space 'layers.{1,2}': 12 units (2 alike; this is layers.1)" in short
    assert "space 'layers.2'" not in short
    assert "alike" not in full
    assert full.count("space 'layers.") == 4


def test_inspect_draws(cli, pair):
    code, out, err = cli("inspect", *BASE, pair[0], "--svg", "net.svg", "--dot", "net.gv")
    assert (code, err) == (0, "weldnet: wrote net.gv\nweldnet: wrote net.svg\n")
    assert "space 'layers.0'" in out
    assert Path("net.svg").read_text().startswith("<svg ")
    assert Path("net.gv").read_text().startswith("digraph ")
    assert cli("inspect", *BASE, "--svg", "-")[1] == Path("net.svg").read_text()
    assert cli("inspect", *BASE, "--dot", "-")[1] == Path("net.gv").read_text()
    assert not list(Path().glob(".weldnet-*"))


@pytest.mark.parametrize(
    ("drawings", "words"),
    [
        (["--svg", "a.png"], ["a.png", ".svg"]),
        (["--dot", "a.svg"], ["a.svg", ".gv"]),
        (["--dot", "-", "--json"], ["--dot - and --json", "stdout"]),
        (["--dot", "-", "--svg", "-"], ["--dot - and --svg -"]),
    ],
)
def test_inspect_refuses_drawings_that_cannot_be_meant(cli, pair, drawings, words):
    code, out, err = cli("inspect", *BASE, *drawings)
    assert (code, out) == (2, "")
    assert all(word in err for word in words)
    assert sorted(path.name for path in Path().iterdir()) == ["a.safetensors", "b.safetensors"]


def test_inspect_by_either_route(cli, pair):
    code, out, err = cli("inspect", *BASE, "--route", "export", "--json")
    assert (code, err) == (0, "")
    assert out == cli("inspect", *BASE, "--route", "dispatch", "--json")[1]
    code, _, err = cli("inspect", *BASE, "--route", "exprot")
    assert code == 2
    assert "unknown route 'exprot' (did you mean 'export'?); the routes are auto, dispatch, export" in err


def test_check(cli, pair):
    code, out, err = cli("check", *pair, *BASE)
    assert (code, err) == (0, "")
    assert [line.split()[:2] for line in out.splitlines()] == [["a", "passed:"], ["b", "passed:"]]
    document = json.loads(cli("check", *pair, *BASE, "--json")[1])
    assert document["b"]["error"] < document["b"]["tolerance"]


def test_evaluate(cli, pair):
    code, out, err = cli("evaluate", *pair, "--model", MODEL, "--data", "digits", "--ensemble")
    assert code == 0
    assert err.startswith("weldnet: data: digits, 360 test images; pixels normalised as ")
    assert err.count("\n") == 1
    assert "ensemble" in out
    document = json.loads(cli("evaluate", *pair, "--model", MODEL, "--data", "digits", "--json")[1])
    assert [row["name"] for row in document["networks"]] == ["a", "b"]
    assert document["networks"][0]["samples"] == 360
    assert document["ensemble"] is None


DATA = """
import torch
from torch.utils.data import DataLoader, TensorDataset

def pair(split):
    g = torch.Generator().manual_seed(len(split))
    return torch.randn(40, 1, 8, 8, generator=g), torch.randint(10, (40,), generator=g)

def dataset(split):
    return TensorDataset(*pair(split))

def loader(split):
    return DataLoader(dataset(split), batch_size=7)
"""


@pytest.mark.parametrize("kind", ["pair", "dataset", "loader"])
def test_data_of_ones_own(cli, pair, kind):
    Path("own.py").write_text(DATA)
    spec = f"own.py:{kind}"
    code, out, err = cli("evaluate", *pair, "--model", MODEL, "--data", spec, "--json")
    assert code == 0, err
    assert json.loads(out)["networks"][0]["samples"] == 40
    assert f"weldnet: data: {spec}, 40 test samples, as the factory gives them; weldnet normalises nothing\n" in err
    code, _, err = cli("fuse", *pair, "-o", "f.pt", *BASE, "--data", spec, "--samples", 20)
    assert code == 0, err
    assert "20 train samples" in err
    assert cli("barrier", *pair, *BASE, "--data", spec, "--points", 2)[0] == 0
    code, out, err = cli("train", "--model", MODEL, "--data", spec, "--epochs", 1, "-o", "t.pt")
    assert code == 0, err


@pytest.mark.parametrize("prefix", ["model.", "lit.net."])
def test_a_prefix_of_all_keys_is_stripped_and_said(cli, pair, prefix):
    state = {f"{prefix}{key}": value for key, value in checkpoints.load(pair[1]).items()}
    torch.save({"state_dict": state, "epoch": 3, "pytorch-lightning_version": "2.4.0"}, "lit.ckpt")
    code, _, err = cli("fuse", pair[0], "lit.ckpt", "-o", "f.safetensors", *BASE)
    assert code == 0, err
    assert f"weldnet: note: lit.ckpt: all keys are read without their prefix '{prefix}'" in err
    assert checkpoints.load("f.safetensors").keys() == checkpoints.load(pair[0]).keys()


def test_a_prefix_that_only_the_model_has_is_added_and_said(cli, pair):
    Path("wrapped.py").write_text(
        "from torch import nn\nfrom weldnet.models import mlp\n"
        "class Wrapped(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.net = mlp(sizes=(64, 12, 10))\n"
        "    def forward(self, x):\n        return self.net(x)\n"
    )
    code, _, err = cli("check", *pair, "--model", "wrapped.py:Wrapped", "--input", "1,1,8,8")
    assert code == 0, err
    assert err.count("with the prefix 'net.'") == 2


def test_a_prefix_of_some_keys_is_named(cli, pair):
    state = {f"model.{key}": value for key, value in checkpoints.load(pair[1]).items()}
    torch.save({"state_dict": {**state, "criterion.weight": torch.ones(10)}}, "lit.ckpt")
    code, _, err = cli("check", "lit.ckpt", *BASE)
    assert code == 1
    assert "without the prefix 'model.' 4 of its 5 keys are keys of the model" in err


def test_the_names_known_before_torch_are_those_of_the_library():
    from weldnet.alignment import METHODS
    from weldnet.cli import _early, _known
    from weldnet.data import NAMES
    from weldnet.fusion import REPAIRS
    from weldnet.models import MODELS
    from weldnet.structure import ROUTES

    assert {
        name: tuple(field.name for field in dataclasses.fields(kind)) for name, kind in METHODS.items()
    } == _known.METHOD_OPTIONS
    assert {name: tuple(inspect.signature(make).parameters) for name, make in MODELS.items()} == _known.MODEL_OPTIONS
    assert sorted(METHODS) == sorted(_early.METHOD_NAMES)
    assert sorted(REPAIRS) == sorted(_early.REPAIR_NAMES)
    assert _early.DATA_NAMES == NAMES
    assert _early.ROUTE_NAMES == ROUTES
    assert _early.WRITTEN_SUFFIXES == checkpoints.SUFFIXES


@pytest.mark.parametrize(
    "wrong",
    [
        ["--method", "gamff"],
        ["--weights", ".5,.6"],
        ["--weights", "1"],
        ["-o", "f.onnx"],
        ["--report", "r.pdf"],
        ["-o", "a.safetensors"],
        ["gone.pt"],
        ["--data", "nowhere"],
        ["--option", "sgima=4"],
        ["--model", "mpl"],
        ["--model", "mlp?size=4"],
        ["--model", "gone.py:make"],
        ["--model", "no_such_package.nets:make"],
        ["--model", "nets.py"],
        ["--input", "1,sixty"],
        ["--input", "1,64:int63"],
        ["--input", "gone.pt"],
        ["-o", "shards", "--stream", "--shard-size", "5XB"],
    ],
    ids=str,
)
def test_wrong_usage_is_found_before_torch_is_imported(pair, wrong):
    arguments = ["fuse", *map(str, pair), "-o", "f.pt", *BASE, *wrong]
    script = (
        "import sys\nfrom weldnet.cli import main\n"
        f"code = main({arguments!r})\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == (1 if "gone.pt" in wrong else 2), done.stderr
    assert done.stderr.startswith("weldnet: error: ")
    assert done.stderr.count("\n") == 1


def test_barrier_is_zero_between_a_network_and_its_renumbering(cli, pair):
    structure = weldnet.capture(build_model(MODEL), torch.zeros(1, 1, 8, 8))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    state = checkpoints.load(pair[0])
    checkpoints.save(weldnet.structure.renumber(state, structure, {"layers.0": order}), "moved.pt")
    arguments = ("barrier", pair[0], "moved.pt", *BASE, "--data", "digits", "--points", 5)
    code, out, err = cli(*arguments, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["before"]["barrier"] > 1e-3
    assert document["after"]["barrier"] < 1e-5
    assert len(document["after"]["accuracy"]) == 5
    assert "barrier after alignment" in cli(*arguments)[1]


def test_train_is_decided_by_its_seed_and_leaves_no_state(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("train", "--model", MODEL, "--data", "digits", "--epochs", 2, "--lr", "0.01", "--json")
    for name, seed in (("one", 4), ("two", 4), ("other", 5)):
        code, out, err = cli(*arguments, "--seed", seed, "-o", f"{name}.safetensors")
        assert code == 0, err
        assert len(json.loads(out)["history"]) == 2
    one, two, other = (checkpoints.load(f"{name}.safetensors") for name in ("one", "two", "other"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["layers.0.weight"], other["layers.0.weight"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "one.safetensors",
        "other.safetensors",
        "two.safetensors",
    ]


def test_train_resumes_where_it_was_interrupted(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("train", "--model", MODEL, "--data", "digits", "--epochs", 3, "-o")
    assert cli(*arguments, "whole.pt")[0] == 0
    import weldnet.training._run as run

    advance = run._Run.advance

    def stop_at_the_third(self, *rest):
        if len(self.history) == 2:
            raise KeyboardInterrupt
        advance(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(run._Run, "advance", stop_at_the_third)
        code, _, err = cli(*arguments, "parts.pt", "--resume")
    assert code == 130
    assert "note: there is no parts.pt.state to go on from; starting afresh" in err
    assert err.splitlines()[-1] == ("weldnet: error: interrupted; go on with --resume, the state is in parts.pt.state")
    assert [line.partition(" loss ")[0] for line in err.splitlines() if "epoch" in line] == [
        "weldnet: epoch 1/3",
        "weldnet: epoch 2/3",
    ]
    code, _, err = cli(*arguments, "parts.pt", "--resume", "--lr", 0.5)
    assert code == 1
    assert "remove that file to start afresh" in err
    code, _, err = cli(*arguments, "parts.pt")
    assert code == 2
    assert "'parts.pt.state' is an unfinished training; go on with it by --resume" in err
    assert not Path("parts.pt").exists()
    assert Path("parts.pt.state").exists()
    assert cli(*arguments, "parts.pt", "--resume")[0] == 0
    whole, parts = checkpoints.load("whole.pt"), checkpoints.load("parts.pt")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert not Path("parts.pt.state").exists()


def test_demo_does_the_main_job(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("demo", "--json")
    assert code == 0, err
    document = json.loads(out)
    accuracy = {row["role"]: row["scores"]["accuracy"] for row in document["rows"]}
    assert accuracy["parent"] > 0.97
    assert accuracy["fused"] > accuracy["naive"] + 0.1
    assert accuracy["fused"] > accuracy["parent"] - 0.03
    written = {path.name for path in Path("demo").iterdir()}
    assert written == {"a.safetensors", "b.safetensors", "fused.safetensors", "report.html"}
    with safe_open("demo/fused.safetensors", "pt") as file:
        assert {parent["file"] for parent in json.loads(file.metadata()["parents"])} == {
            "a.safetensors",
            "b.safetensors",
        }
    assert "next: weldnet fuse demo/a.safetensors" in err


# -- specs -------------------------------------------------------------------------------------------


def test_model_specs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "import torch\nfrom torch import nn\nimport helper\nprint('noise')\n"
        "def make(): return nn.Linear(helper.SIZE, 2)\nready = nn.Linear(5, 2)\n"
        "def compiled(): return torch.compile(make())\n"
        "class Zoo:\n    net = staticmethod(make)\n"
    )
    Path("helper.py").write_text("SIZE = 3\n")
    for spec, size in (("mine:make", 3), ("mine.py:make", 3), ("./mine.py:ready", 5), ("mine:Zoo.net", 3)):
        assert build_model(spec).in_features == size
    assert type(build_model("mine:compiled")) is nn.Linear
    assert len(build_model("weldnet.models:mlp?sizes=4,3,2").layers) == 2
    assert build_model("mlp?sizes=4,3,2&bias=false").layers[0].bias is None


def test_model_seed_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    a, b = build_model(MODEL, seed=1), build_model(MODEL, seed=1)
    assert torch.equal(a.layers[0].weight, b.layers[0].weight)
    assert torch.equal(before, torch.get_rng_state())


def test_input_specs(tmp_path):
    model = nn.Linear(2, 2)
    assert make_input("1,3,4", model).shape == (1, 3, 4)
    assert make_input("1,3", model.half()).dtype == torch.float16
    tokens = make_input("1,16:int64", model)
    assert tokens.dtype == torch.int64
    assert not tokens.any()
    below = make_input("4,64:int64<50", model, seed=1)
    assert (int(below.min()), int(below.max())) == (0, 49)
    assert torch.equal(below, make_input("4,64:int64<50", model, seed=1))
    assert not torch.equal(below, make_input("4,64:int64<50", model, seed=2))
    assert make_input("64:bool<2", model).float().mean() not in (0, 1)
    named = make_input("ids=1,16:int64<9; mask = 1,16:bool=1; x=2,3", model)
    assert [(k, t.dtype, tuple(t.shape)) for k, t in named.items()] == [
        ("ids", torch.int64, (1, 16)),
        ("mask", torch.bool, (1, 16)),
        ("x", torch.float16, (2, 3)),
    ]
    assert named["mask"].all()
    assert make_input("x=4", model).keys() == {"x"}
    first, second = make_input("1,3:float64; 2", model)
    assert (first.dtype, second.shape) == (torch.float64, (2,))
    assert torch.equal(make_input("4,4", model, seed=1), make_input("4,4", model, seed=1))
    torch.save({"x": torch.ones(2), "y": torch.zeros(1)}, tmp_path / "kw.pt")
    assert make_input(str(tmp_path / "kw.pt"), model).keys() == {"x", "y"}
    torch.save({"batch": {"ids": torch.ones(2), "more": [torch.zeros(1)]}}, tmp_path / "nested.pt")
    assert torch.equal(make_input(str(tmp_path / "nested.pt"), model)["batch"]["ids"], torch.ones(2))
    checkpoints.save({"x": torch.ones(2, 3)}, tmp_path / "x.safetensors")
    assert make_input(str(tmp_path / "x.safetensors"), model).shape == (2, 3)


def test_networks_are_named_after_their_files():
    def named(*files: str) -> list[str]:
        return name_files([Path(file) for file in files])

    assert named("x/a.pt", "b.safetensors") == ["a", "b"]
    assert named("s1/model.pt", "s2/model.pt", "c.pt") == ["s1/model", "s2/model", "c"]
    assert named("a.pt", "a.pt", "a.bin") == ["a", "a#2", "a#3"]
    assert named("m.safetensors.index.json", "folder") == ["m", "folder"]


def test_option_values():
    assert parse_options(["a=1", "b=0.5", "c=inf", "d=true", "e=word", "f=1,2"]) == {
        "a": 1,
        "b": 0.5,
        "c": float("inf"),
        "d": True,
        "e": "word",
        "f": (1, 2),
    }
    with pytest.raises(UsageError, match="KEY=VALUE"):
        parse_options(["novalue"])


def test_a_stray_print_does_not_spoil_the_data(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("chatty.py").write_text(
        "from torch import nn\nprint('importing')\n"
        "class Net(nn.Linear):\n"
        "    def __init__(self): super().__init__(3, 2); print('building')\n"
        "    def forward(self, x): print('running'); return super().forward(x)\n"
    )
    code, out, err = cli("inspect", "--model", "chatty.py:Net", "--input", "1,3", "--json")
    assert code == 0
    assert json.loads(out)["format"] == "weldnet-structure"
    assert "building" in err


# -- interruption ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_an_interrupt_in_the_middle_leaves_nothing(tmp_path, number):
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self): super().__init__(); self.a = nn.Linear(3, 2)\n"
        "    def forward(self, x):\n"
        "        pathlib.Path('started').touch(); time.sleep(30); return self.a(x)\n"
    )
    for name in "ab":
        checkpoints.save(nn.ModuleDict({"a": nn.Linear(3, 2)}).state_dict(), tmp_path / f"{name}.pt")
    arguments = [
        "fuse",
        "a.pt",
        "b.pt",
        "-o",
        "new/f.pt",
        "--model",
        "slow.py:Net",
        "--input",
        "1,3",
        "--report",
        "r.md",
    ]
    # A background job inherits an ignored SIGINT; the child must not.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    script = f"{heed}; import sys; from weldnet.cli import main; sys.exit(main({arguments!r}))"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == "weldnet: error: interrupted; no partial file is left\n"
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"a.pt", "b.pt", "slow.py", "started"}


# -- outputs that count ------------------------------------------------------------------------------

TWO_OUTPUTS = """
import torch
from torch import nn


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        hidden = torch.tanh(self.a(x))
        return {"logits": self.b(hidden), "hidden": hidden}
"""


@pytest.fixture
def two_outputs(tmp_path, monkeypatch) -> tuple[str, ...]:
    """Two saved networks that return their hidden units, and the options that describe them."""
    monkeypatch.chdir(tmp_path)
    Path("two.py").write_text(TWO_OUTPUTS, encoding="utf-8")
    for seed, name in enumerate("ab"):
        checkpoints.save(build_model("two.py:Two", seed=seed).state_dict(), tmp_path / f"{name}.safetensors")
    return ("--model", "two.py:Two", "--input", "1,5")


def test_inspect_shows_which_outputs_count(cli, two_outputs):
    assert json.loads(cli("inspect", *two_outputs, "--json")[1])["spaces"] == []
    code, out, _ = cli("inspect", *two_outputs, "--outputs", "logits")
    assert code == 0
    assert "outputs that count: logits" in out
    assert "space 'a': 6 units" in out
    code, _, err = cli("inspect", *two_outputs, "--outputs", "logit,hidden")
    assert code == 2
    assert "no output 'logit'; it returns logits[1, 3], hidden[1, 6]; choose among these" in err


@pytest.mark.parametrize("route", ["dispatch", "export"])
def test_check_fuse_and_config_take_a_route(cli, pair, route, monkeypatch):
    from weldnet.structure import _capture

    taken: list[str] = []
    record = _capture.record
    monkeypatch.setattr(_capture, "record", lambda *given: (taken.append(given[3]), record(*given))[1])
    Path("fuse.yaml").write_text(f"route: {route}\n", encoding="utf-8")
    fuse = ("fuse", *pair, "-o", "f.safetensors", *BASE)
    for command in (
        ("check", *pair, *BASE, "--route", route),
        (*fuse, "--route", route),
        (*fuse, "--config", "fuse.yaml"),
    ):
        taken.clear()
        assert cli(*command)[0] == 0
        assert set(taken) == {route}
    for command in ("check", *pair, *BASE), fuse:
        code, _, err = cli(*command, "--route", "exprot")
        assert code == 2
        assert "unknown route 'exprot' (did you mean 'export'?)" in err


def test_check_says_where_there_is_nothing_to_renumber(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("one.py").write_text("from torch import nn\n\ndef make():\n    return nn.Linear(4, 3)\n", encoding="utf-8")
    checkpoints.save(build_model("one.py:make", seed=0).state_dict(), tmp_path / "a.safetensors")
    command = ("check", "a.safetensors", "--model", "one.py:make", "--input", "1,4")
    code, out, _ = cli(*command)
    assert code == 0
    assert out.startswith("a  nothing to renumber: the structure has no spaces")
    assert "passed" not in out
    assert json.loads(cli(*command, "--json")[1])["a"]["spaces"] == 0


def test_check_fuse_and_config_take_outputs(cli, two_outputs):
    code, out, _ = cli("check", "a.safetensors", *two_outputs, "--outputs", "logits", "--json")
    assert code == 0
    assert json.loads(out)["a"]["renumberings"] == 3
    fuse = ("fuse", "a.safetensors", "b.safetensors", "-o", "f.safetensors", *two_outputs, "--outputs", "logits, ")
    assert yaml.safe_load(cli(*fuse, "--print-config")[1])["outputs"] == ["logits"]
    Path("fuse.yaml").write_text("outputs: [logits]\nrepair: none\n", encoding="utf-8")
    for command in (fuse, (*fuse[:-2], "--config", "fuse.yaml")):
        code, out, _ = cli(*command, "--json")
        assert code == 0
        assert json.loads(out)["spaces"] == 1


# -- power -------------------------------------------------------------------------------------------


def test_check_shows_the_weakest_evidence_unless_told_not_to(cli, pair):
    code, out, err = cli("check", *pair, *BASE)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line[:11] for line in lines] == ["a  passed: ", "b  passed: "]
    assert all("allowed); weakest evidence: '" in line for line in lines)
    assert all(line.endswith(" (power), 0 of 3 tensors without evidence") for line in lines)
    assert "power" not in cli("check", *pair, *BASE, "--no-power")[1]
    measured = json.loads(cli("check", *pair, *BASE, "--json")[1])["b"]["power"]
    assert set(measured["by_tensor"]) == {"layers.0.weight", "layers.0.bias", "layers.1.weight"}
    assert measured["by_tensor"][measured["weakest"]] == min(measured["by_tensor"].values())
    assert measured["silent"] == measured["deaf"] == []
    assert measured["error"] <= measured["tolerance"]


def test_fuse_takes_networks_of_other_widths(cli, tmp_path):
    specs = {"narrow": "mlp?sizes=16,8,6,3", "wide": "mlp?sizes=16,12,9,3"}
    for name, spec in specs.items():
        checkpoints.save(build_model(spec).state_dict(), tmp_path / f"{name}.safetensors")
    files = [tmp_path / "wide.safetensors", tmp_path / "narrow.safetensors"]
    given = ["--model", specs["wide"], "--model", specs["narrow"], "--input", "1,16"]
    out = tmp_path / "fused.safetensors"
    line = ["fuse", *files, "-o", out, *given, "--method", "optimal_transport"]
    code, printed, _ = cli(*line, "--into", "narrow")
    assert code == 0
    assert "naive truncation" not in printed  # nothing was measured
    assert "the couplings of wide are soft" in printed
    assert {k: t.shape for k, t in checkpoints.load(out).items()} == {
        k: t.shape for k, t in checkpoints.load(files[1]).items()
    }
    code, _, error = cli(*line, "--into", "nobody")
    assert code == 2
    assert "into is 'nobody', which is no network; give one of wide, narrow" in error
    code, _, error = cli("fuse", *files, "-o", out, *given, "--method", "gamf")
    assert code == 1
    assert "has 12 units in 'wide' and 8 in 'narrow'; gamf needs equal widths: take optimal_transport" in error
    code, _, error = cli("fuse", *files, files[0], "-o", out, *given)
    assert code == 2
    assert "--model is given 2 times for 3 networks" in error
    code, _, error = cli("fuse", *files, "-o", out, "--model", specs["narrow"], "--input", "1,16")
    assert code == 1
    assert "'wide'" in error
    code, printed, _ = cli(*line, "--into", "narrow", "--print-config")
    assert code == 0
    assert "into: narrow" in printed
    assert f"- {specs['wide']}" in printed


def test_fold_writes_the_narrower_network(cli, tmp_path):
    wide, narrow = "mlp?sizes=64,12,9,10", "mlp?sizes=64,8,6,10"
    checkpoints.save(build_model(wide).state_dict(), tmp_path / "wide.safetensors")
    out = tmp_path / "folded.safetensors"
    line = ["fold", tmp_path / "wide.safetensors", "-o", out, "--model", wide, "--into", narrow, "--input", "1,64"]
    code, printed, _ = cli(*line, "--data", "digits", "--json")
    assert code == 0
    found = json.loads(printed)
    assert found["wide"]["parameters"] > found["folded"]["parameters"]
    assert 0 <= found["folded"]["accuracy"] <= 1
    assert checkpoints.load(out)["layers.0.weight"].shape == (8, 64)
    assert json.loads(checkpoints.read_metadata(out)["config"])["into"] == narrow
    code, printed, error = cli(*line, "--data", "digits")
    assert code == 0
    assert "folded  parameters" in printed
    assert f", accuracy {found['folded']['accuracy']:.2%}, " in printed
    assert f"wrote {out}" in error
    code, _, error = cli(*line[:-3], wide.replace("12", "16"), *line[-2:])
    assert code == 1
    assert "has 12 units in the network and 16 in the one that it is to be folded into" in error
    code, _, error = cli("fold", out, "-o", out, *line[4:])
    assert code == 2
