"""Bad input: one clear line on stderr, exit code 1 or 2, nothing on stdout, nothing written."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from weldnet import checkpoints
from weldnet.cli import main
from weldnet.cli._model import build_model

MODEL = "mlp?sizes=4,8,3"
BASE = ("--model", MODEL, "--input", "1,4")
OUT = ("-o", "out/fused.safetensors")

MODELS = """
import torch
from torch import nn

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

class ToList(Base):
    def forward(self, x):
        return self.b(torch.tensor(self.a(x).tolist()))

class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

class Custom(Base):
    def forward(self, x):
        return self.b(Twice.apply(self.a(x)))

class Broken(Base):
    def forward(self, x):
        raise ValueError("no forward today")

def plain():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

def scripted():
    return torch.jit.script(plain())

def fails():
    raise RuntimeError("the licence server is down")

def needs_size(size):
    return nn.Linear(size, 2)

def text():
    return "not a network"

def count():
    return 3

def leaves():
    raise SystemExit(3)

number = 3
"""


class Payload:
    """Unpickling this would make a file."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Two good checkpoints and a file of models, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a.pt", "b.pt")):
        checkpoints.save(build_model(MODEL, seed=seed).state_dict(), name)
    Path("models.py").write_text(MODELS)
    return tmp_path


@pytest.fixture
def refused(folder, capsys):
    """Run a command that must be refused, and check everything that refusing means."""

    def run(code: int, words: list[str], *arguments: object) -> str:
        before = _snapshot(folder)
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        out, err = capsys.readouterr()
        assert out == ""
        err = "".join(line for line in err.splitlines(True) if not line.startswith("weldnet: data: "))
        assert err.startswith("weldnet: error: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        for word in words:
            assert word in err
        assert _snapshot(folder) == before
        return err

    return run


def _snapshot(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in files}


def _change(name: str, **changes: object) -> None:
    state = checkpoints.load(name)
    for key, value in changes.items():
        key = key.replace("__", ".")
        if value is None:
            del state[key]
        else:
            assert isinstance(value, torch.Tensor)
            state[key] = value
    checkpoints.save(state, name)


# -- which files -------------------------------------------------------------------------------------


def test_no_files(refused):
    refused(2, ["two networks or more", "no files"], "fuse", *OUT, *BASE)


def test_one_file(refused):
    refused(2, ["two networks or more", "only 'a.pt'"], "fuse", "a.pt", *OUT, *BASE)


@pytest.mark.parametrize("command", ["fuse", "check", "inspect"])
def test_a_missing_file(refused, command):
    files = ["gone.pt"] if command == "inspect" else ["a.pt", "gone.pt"]
    refused(1, ["'gone.pt'"], command, *files, *(OUT if command == "fuse" else ()), *BASE)


@pytest.mark.parametrize("command", ["fuse", "check", "inspect"])
def test_a_file_that_may_not_be_read_is_refused_by_weldnet(refused, command, monkeypatch):
    """Not by click, in other words and as wrong usage."""
    Path("b.pt").write_bytes(b"")
    monkeypatch.setattr(os, "access", lambda path, *_, **__: Path(path).name != "b.pt")
    files = ["a.pt", "b.pt", *OUT] if command == "fuse" else ["b.pt"]
    refused(1, ["'b.pt': the file is empty"], command, *files, *BASE)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.99])
def test_a_truncated_file(refused, suffix, share):
    file = Path(f"cut{suffix}")
    checkpoints.save(checkpoints.load("b.pt"), file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    refused(1, [f"'{file}'"], "fuse", "a.pt", file, *OUT, *BASE)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_a_corrupt_file(refused, suffix):
    Path(f"noise{suffix}").write_bytes(bytes(range(256)) * 20)
    refused(1, [f"'noise{suffix}'"], "fuse", "a.pt", f"noise{suffix}", *OUT, *BASE)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_would_run_code(refused, protocol, folder):
    Path("evil.pt").write_bytes(pickle.dumps({"weights": Payload()}, protocol=protocol))
    refused(1, ["'evil.pt'"], "fuse", "a.pt", "evil.pt", *OUT, *BASE)
    torch.save({"weights": Payload()}, "evil.pth")
    refused(1, ["'evil.pth'"], "fuse", "a.pt", "evil.pth", *OUT, *BASE)
    assert not (folder / "pwned").exists()


# -- what is in them ---------------------------------------------------------------------------------


def test_a_missing_key(refused):
    _change("b.pt", layers__1__bias=None)
    refused(1, ["'b'", "lacks 1 key", "'layers.1.bias'"], "fuse", "a.pt", "b.pt", *OUT, *BASE)


def test_an_extra_key(refused):
    _change("b.pt", layers__1__scale=torch.ones(3))
    refused(1, ["'b'", "1 key", "'layers.1.scale'"], "fuse", "a.pt", "b.pt", *OUT, *BASE)


def test_a_key_of_another_shape(refused):
    _change("b.pt", layers__0__bias=torch.ones(9))
    refused(1, ["'layers.0.bias'", "(9,)", "(8,)", "'b'"], "fuse", "a.pt", "b.pt", *OUT, *BASE)


def test_different_architectures(refused):
    checkpoints.save(build_model("simple_cnn?image_size=8").state_dict(), "cnn.pt")
    refused(1, ["'cnn'", "different architectures", "'conv1.weight'"], "fuse", "a.pt", "cnn.pt", *OUT, *BASE)


def test_different_widths(refused):
    checkpoints.save(build_model("mlp?sizes=4,16,3").state_dict(), "wide.pt")
    refused(1, ["'wide'", "(16, 4)", "(8, 4)"], "fuse", "a.pt", "wide.pt", *OUT, *BASE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("command", ["fuse", "check"])
def test_weights_that_are_not_finite(refused, value, command):
    weight = checkpoints.load("b.pt")["layers.1.weight"].clone()
    weight[1, 2] = value
    _change("b.pt", layers__1__weight=weight)
    output = OUT if command == "fuse" else ()
    refused(1, ["'b'", "'layers.1.weight'", "NaN or inf"], command, "a.pt", "b.pt", *output, *BASE)


# -- how they are to be fused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (".5,.6", ["sum to 1.1", "not to 1"]),
        ("-0.5,1.5", ["-0.5"]),
        ("nan,1", ["nan"]),
        (".5,.25,.25", ["3 weights for 2 networks"]),
        ("half,half", ["--weights", "'half' is not a number", "sum to 1"]),
        ("0,0", ["sum to 0"]),
    ],
)
def test_weights_of_the_average(refused, weights, words):
    refused(2, words, "fuse", "a.pt", "b.pt", *OUT, *BASE, f"--weights={weights}")


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        ("1,5", 1, ["MLP", "[1, 5]"]),
        ("1,4:int64", 1, ["MLP", "int64[1, 4]"]),
        ("1,4:int65", 2, ["'int65'", "'int64'"]),
        ("1,x", 2, ["'1,x'", "not a shape"]),
        ("1,0", 2, ["'1,0'", "below 1"]),
        ("1,4<5", 2, ["'1,4<5'", "integers"]),
        ("1,4:int64<0", 2, ["'1,4:int64<0'", "limit 0"]),
        ("1,4:int8<300", 2, ["limit 300", "127"]),
        ("1,4:int64<many", 2, ["'many'", "integer"]),
        ("1,4:bool=2", 2, ["2 is no value from 0 to 1"]),
        ("x=1,4;1,4", 2, ["names x and not the rest", "all inputs or none"]),
        ("x=1,4;x=1,4", 2, ["names x twice"]),
        ("ids=1,4", 1, ["MLP", "unexpected keyword argument 'ids'"]),
        ("", 2, ["empty"]),
        ("1,4;1,4", 1, ["MLP"]),
        ("gone.pt", 1, ["'gone.pt'", "does not exist"]),
        ("models.safetensors", 1, ["'models.safetensors'"]),
    ],
)
def test_an_example_input_that_does_not_fit(refused, spec, code, words):
    refused(code, words, "fuse", "a.pt", "b.pt", *OUT, "--model", MODEL, "--input", spec)


def test_an_example_input_that_cannot_be_read(refused):
    Path("folder.pt").mkdir()
    words = ["the example input 'folder.pt' cannot be read: Is a directory"]
    refused(1, words, "inspect", "--model", MODEL, "--input", "folder.pt")


def test_an_example_input_that_would_run_code(refused, folder):
    torch.save(Payload(), "evil.pt")
    refused(1, ["'evil.pt'"], "inspect", "--model", MODEL, "--input", "evil.pt")
    assert not (folder / "pwned").exists()


def test_an_unknown_method(refused):
    refused(2, ["'gamff'", "did you mean 'gamf'"], "fuse", "a.pt", "b.pt", *OUT, *BASE, "--method", "gamff")


@pytest.mark.parametrize("method", ["activation_matching", "straight_through"])
def test_a_method_that_needs_data(refused, method):
    refused(2, [f"--method {method} ", "give --data"], "fuse", "a.pt", "b.pt", *OUT, *BASE, "--method", method)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("sgima=4", ["'sgima'", "did you mean 'sigma'"]),
        ("sweeps=0", ["sweeps", "0", "1 or more"]),
        ("sweeps=1.5", ["'sweeps' is 1.5; give a whole number"]),
        ("tau=true", ["'tau' is True; give a number"]),
        ("affinity=edgy", ["did you mean 'edge'?", "edge or vector"]),
        ("sigma", ["'sigma'", "KEY=VALUE"]),
        ("sigma=-1", ["sigma", "-1"]),
        ("sigma=wide", ["sigma", "wide"]),
        ("tau=none", ["tau"]),
        ("affinity=edges", ["affinity", "edges"]),
        ("precision=tf32", ["tf32", "cpu", "bfloat16"]),
        ("activations=1", ["--option activations=1", "give --data"]),
    ],
)
def test_an_unknown_method_option(refused, option, words):
    refused(2, words, "fuse", "a.pt", "b.pt", *OUT, *BASE, "--option", option)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--metod", "gamf"], ["--metod"]),
        (["--repair", "magic"], ["'magic'", "auto"]),
        (["--repair", "data"], ["--data"]),
        (["--size", "2.5"], ["2.5", "2 (every parent kept whole)"]),
        (["--size", "big"], ["big"]),
        (["--samples", "0"], ["samples"]),
        (["--seed", "-1"], ["seed"]),
        (["--device", "gpu9"], ["gpu9"]),
    ],
)
def test_an_unknown_command_line_option(refused, arguments, words):
    refused(2, words, "fuse", "a.pt", "b.pt", *OUT, *BASE, *arguments)


def test_an_unknown_command(refused):
    assert refused(2, ["fuze", "'fuse'"], "fuze", "a.pt", "b.pt").count("Did you mean") == 1


@pytest.mark.parametrize("left_out", ["-o", "--model", "--input"])
def test_something_needed_is_left_out(refused, left_out):
    arguments = {"-o": "f.pt", "--model": MODEL, "--input": "1,4"}
    del arguments[left_out]
    rest = [word for pair in arguments.items() for word in pair]
    refused(2, [left_out], "fuse", "a.pt", "b.pt", *rest)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("metod: gamf", ["'metod'", "'method'"]),
        ("colour: red", ["'colour'", "the keys are"]),
        ("method: [1, 2]", ["method"]),
        ("samples: many", ["samples", "many"]),
        ("weights: {a: x}", ["weights"]),
        ("- a\n- b", ["list"]),
        ("a: b: c", ["not YAML"]),
        ("options: 3", ["options"]),
    ],
)
def test_a_config_that_means_nothing(refused, text, words):
    Path("fuse.yaml").write_text(text)
    refused(2, ["fuse.yaml", *words], "fuse", "a.pt", "b.pt", *OUT, *BASE, "--config", "fuse.yaml")


def test_a_config_that_cannot_be_read(refused):
    refused(2, ["'gone.yaml'"], "fuse", "a.pt", "b.pt", *OUT, *BASE, "--config", "gone.yaml")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    refused(2, ["'binary.yaml'"], "fuse", "a.pt", "b.pt", *OUT, *BASE, "--config", "binary.yaml")


def test_data_that_is_not_there(refused):
    for command in (("fuse", "a.pt", "b.pt", *OUT, *BASE), ("evaluate", "a.pt", "--model", MODEL)):
        refused(2, ["'nowhere'", "cifar10"], *command, "--data", "nowhere")
        refused(2, ["did you mean 'digits'"], *command, "--data", "digit")


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        ("mine.py:gone", 2, ["'gone'"]),
        ("none.py:gone", 2, ["no file 'none.py'", "--data"]),
        ("mine.py:fails", 1, ["KeyError", "split='train'"]),
        ("mine.py:text", 1, ["a str", "(inputs, labels)"]),
        ("mine.py:uneven", 1, ["(3, 4)", "(2,)"]),
    ],
)
def test_a_data_factory_that_cannot_be_used(refused, spec, code, words):
    Path("mine.py").write_text(
        "import torch\n"
        "def fails(split): raise KeyError(split)\n"
        "def text(split): return 'none'\n"
        "def uneven(split): return torch.ones(3, 4), torch.zeros(2, dtype=torch.int64)\n"
    )
    refused(code, words, "evaluate", "a.pt", "--model", MODEL, "--data", spec)


def test_data_of_another_shape(refused):
    refused(
        1, ["digits", "(1, 8, 8)"], "train", "--model", "simple_cnn?in_channels=3", "--data", "digits", "-o", "t.pt"
    )


def test_evaluating_on_data_of_another_shape(refused):
    refused(1, ["(1, 8, 8)", "do not fit"], "evaluate", "a.pt", "--model", MODEL, "--data", "digits")


def test_an_unknown_split(refused):
    refused(2, ["'dev'"], "evaluate", "a.pt", "--model", MODEL, "--data", "digits", "--split", "dev")


# -- where the result goes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "code", "words"),
    [
        ("folder.pt", 1, ["'folder.pt'", "folder"]),
        ("a.pt/x.pt", 1, ["'a.pt/x.pt'", "not a folder"]),
        ("fused.onnx", 2, ["'fused.onnx'", ".safetensors"]),
        ("a.pt", 2, ["'a.pt'", "read or written twice"]),
        ("./b.pt", 2, ["'b.pt'", "read or written twice"]),
        ("/proc/fused.pt", 1, ["'/proc/fused.pt'", "cannot be written"]),
    ],
)
def test_an_output_that_cannot_be_written(refused, output, code, words, monkeypatch):
    Path("folder.pt").mkdir()
    monkeypatch.setattr("weldnet.fusion.fuse", lambda *_, **__: pytest.fail("work began before the output was checked"))
    refused(code, words, "fuse", "a.pt", "b.pt", "-o", output, *BASE)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_in_a_protected_folder(refused, folder):
    (folder / "locked").mkdir(mode=0o500)
    refused(1, ["'locked/f.pt'"], "fuse", "a.pt", "b.pt", "-o", "locked/f.pt", *BASE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--report", "r.pdf"], ["'r.pdf'", ".html"]),
        (["--report", "a.pt"], ["'a.pt'"]),
        (["--alignment-out", "al.json"], ["'al.json'", ".safetensors"]),
        (["--alignment-out", "out/fused.safetensors"], ["'out/fused.safetensors'"]),
    ],
)
def test_other_outputs_that_make_no_sense(refused, arguments, words):
    refused(2, words, "fuse", "a.pt", "b.pt", *OUT, *BASE, *arguments)


def test_an_output_among_the_shards_that_are_read(refused, folder):
    (folder / "hf").mkdir()
    checkpoints.save(checkpoints.load("a.pt"), "hf/model.safetensors")
    refused(2, ["read or written twice"], "fuse", "hf", "b.pt", "-o", "hf/model.safetensors", *BASE)


def _full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _full_after_some(state: object, target: object, **_: object) -> None:
    if isinstance(target, Path):
        target.write_bytes(b"half of it")
    else:
        target.write(b"half of it")  # pyright: ignore[reportAttributeAccessIssue]
    _full()


@pytest.mark.parametrize("output", ["out/fused.safetensors", "fused.pt", "old.safetensors"])
@pytest.mark.parametrize("extra", [[], ["--report", "r.html", "--alignment-out", "new/al.safetensors"]], ids=len)
def test_a_full_disk(refused, output, extra, monkeypatch):
    Path("old.safetensors").write_bytes(b"an older result")
    monkeypatch.setattr("weldnet.checkpoints._save.save_file", _full_after_some)
    monkeypatch.setattr("torch.save", _full_after_some)
    words = [f"'{output}'", "No space left on device"]
    refused(1, words, "fuse", "a.pt", "b.pt", "-o", output, *BASE, *extra)


@pytest.mark.parametrize("extra", ["--report=r.html", "--alignment-out=al.safetensors"])
def test_a_disk_that_is_full_at_another_output(refused, extra, monkeypatch):
    monkeypatch.setattr("weldnet.alignment._method.save_file", _full)
    monkeypatch.setattr(Path, "write_text", _full)
    refused(1, [extra.partition("=")[2], "No space left"], "fuse", "a.pt", "b.pt", *OUT, *BASE, extra)


def test_a_full_disk_after_training_loses_no_epoch(folder, monkeypatch, capsys):
    arguments = [
        "train",
        "--model",
        "mlp?sizes=64,4,10",
        "--data",
        "digits",
        "--epochs",
        "1",
        "-o",
        "new/t.safetensors",
    ]
    with monkeypatch.context() as patch:
        patch.setattr("weldnet.checkpoints._save.save_file", _full_after_some)
        assert main(arguments) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "'new/t.safetensors'" in said
    assert "No space left" in said
    assert [path.name for path in Path("new").iterdir()] == ["t.safetensors.state"]
    assert main([*arguments, "--resume"]) == 0
    assert "epoch 1/1" not in capsys.readouterr().err
    assert [path.name for path in Path("new").iterdir()] == ["t.safetensors"]


@pytest.mark.parametrize("where", ["weldnet.checkpoints._save.save_file", "weldnet.fusion._steps.average"])
def test_an_interrupt_leaves_nothing(refused, where, monkeypatch):
    def interrupt(*arguments: object, **_: object) -> None:
        if len(arguments) > 1 and isinstance(arguments[1], Path):
            arguments[1].write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    refused(130, ["interrupted"], "fuse", "a.pt", "b.pt", *OUT, *BASE, "--report", "r.html")


# -- models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        ("models:fails", 1, ["'models:fails'", "RuntimeError", "the licence server is down"]),
        ("models.py:fails", 1, ["RuntimeError", "the licence server is down"]),
        ("models:leaves", 1, ["SystemExit"]),
        ("models:needs_size", 1, ["TypeError", "size", "without arguments"]),
        ("models:text", 1, ["a str", "torch.nn.Module"]),
        ("models:count", 1, ["an int", "torch.nn.Module"]),
        ("models:number", 2, ["'number'", "int"]),
        ("models:plian", 2, ["'plian'", "'plain'"]),
        ("models:Base.missing", 2, ["'Base.missing'"]),
        ("modelz:plain", 2, ["no module 'modelz'"]),
        ("gone.py:plain", 2, ["no file 'gone.py'"]),
        ("broken.py:plain", 1, ["'broken.py'", "SyntaxError"]),
        ("imports:plain", 1, ["'imports'", "ModuleNotFoundError", "not_installed"]),
        ("vgg12", 2, ["'vgg12'", "'vgg11'"]),
        ("mlp?size=4", 2, ["'size'", "did you mean 'sizes'?"]),
        ("models.py", 2, ["name the factory in it, as in models.py:make"]),
        ("models:", 2, ["'models:'"]),
        (":plain", 2, ["':plain'"]),
        (".models:plain", 2, ["--model '.models:plain' begins with a dot"]),
    ],
)
def test_a_factory_that_cannot_be_used(refused, spec, code, words):
    Path("broken.py").write_text("def plain(:\n")
    Path("imports.py").write_text("import not_installed\n")
    refused(code, words, "fuse", "a.pt", "b.pt", *OUT, "--model", spec, "--input", "1,4")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("models.py", "--into 'models.py' is a file; name the factory in it, as in models.py:make"),
        ("gone.py:make", "there is no file 'gone.py'; --into takes"),
        (".models:plain", "--into '.models:plain' begins with a dot"),
        ("models:", "--into 'models:' has nothing on one side"),
    ],
)
def test_folding_into_what_is_not_there_names_the_option(refused, spec, words):
    refused(2, [words, "or a name such as vgg11" if ":" in spec else ""], "fold", "a.pt", *OUT, *BASE, "--into", spec)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ToList", ["ToList", "cannot be traced", "aten.addmm", "plain tensor code"]),
        ("Custom", ["Custom", "cannot be traced", "aten.addmm", "plain tensor code"]),
        ("Broken", ["Broken", "no forward today"]),
    ],
)
def test_a_model_that_cannot_be_traced(refused, name, words):
    for seed, file in enumerate(("c.pt", "d.pt")):
        checkpoints.save(build_model(f"models:{name}", seed=seed).state_dict(), file)
    refused(1, words, "fuse", "c.pt", "d.pt", *OUT, "--model", f"models:{name}", "--input", "1,4")


def test_a_scripted_model(refused):
    for seed, file in enumerate(("c.pt", "d.pt")):
        checkpoints.save(build_model("models:plain", seed=seed).state_dict(), file)
    words = ["TorchScript", "give the Python module that it was made from"]
    refused(1, words, "fuse", "c.pt", "d.pt", *OUT, "--model", "models:scripted", "--input", "1,4")


def test_a_model_without_parameters(refused, folder):
    Path("empty.py").write_text("from torch import nn\nmake = nn.ReLU\n")
    refused(1, ["ReLU", "no parameters"], "inspect", "--model", "empty.py:make", "--input", "1,4")


def test_a_model_whose_structure_does_not_hold(refused, monkeypatch):
    """The renumbering is made wrong on purpose: the check must find it before anything is averaged."""
    from weldnet.structure import _check, _referee

    right = _check.renumber

    def wrong(state, structure, sources):
        moved = right(state, structure, sources)
        moved["layers.0.bias"] = state["layers.0.bias"]
        return moved

    for module in (_check, _referee):
        monkeypatch.setattr(module, "renumber", wrong)
    refused(1, ["layers.0"], "fuse", "a.pt", "b.pt", *OUT, *BASE)


def test_a_refused_fusion_says_nothing_twice(refused):
    assert isinstance(build_model(MODEL), nn.Module)
    message = refused(2, [], "fuse", "a.pt", *OUT, *BASE, "--json")
    assert message.count("weldnet: ") == 1
