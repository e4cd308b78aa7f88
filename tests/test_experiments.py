"""Studies: strict configs, cells by hash, a runner that can be stopped anywhere, networks that are what they say."""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from weldnet import data, experiments, records
from weldnet.cli import main
from weldnet.errors import ConfigError, RecordError, UsageError, WeldnetError
from weldnet.experiments import Cell, Context, Local, NetworkSpec, Observer, Outcome, Study, Watch
from weldnet.experiments._data import save_partition
from weldnet.records import Records
from weldnet.training import Recipe, train

CONFIG: dict[str, Any] = {
    "table": "tiny",
    "title": "Two small networks",
    "paper": [{"source": "somewhere", "rows": [{"networks": 2, "method": "gamf", "accuracy": 0.5}]}],
    "protocol": {
        "dataset": "digits",
        "architectures": {"mlp": {"model": "mlp", "options": {"sizes": [64, 8, 10]}}},
        "recipe": {"epochs": 3, "lr": 0.01},
        "partitions": {"homogeneous": {}, "skew": {"scheme": "skew"}},
        "networks": {2: 1},
        "methods": ["individual", "ensemble", "naive", "gamf"],
        "repairs": ["none", "refit"],
        "samples": 64,
        "barrier": {"points": 3, "rows": 50},
        "couplings": ["gamf"],
        "fine_tuning": {"recipe": {"epochs": 2}, "methods": ["gamf"]},
    },
    "scales": {"smoke": {}, "cpu": {"protocol": {"networks": {2: 2}}}},
}


def changed(path: Path, **protocol: Any) -> str:
    """Write the config with other settings of its protocol; return its path."""
    config = {**CONFIG, "protocol": {**CONFIG["protocol"], **protocol}}
    path.write_text(yaml.safe_dump(config))
    return str(path)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    return changed(tmp_path_factory.mktemp("config") / "tiny.yaml")


@pytest.fixture(scope="session")
def study(config: str) -> Study:
    return experiments.resolve(config, "smoke")


@pytest.fixture(scope="session")
def whole(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the study, unbroken and in one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = experiments.run_study(study, folder)
    assert not done.failed
    return folder


class Heard(Observer):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def measured(found: Records) -> dict[tuple[str, str], dict[str, Any]]:
    """What must not depend on how a run went: all but times, memory, and where it ran."""
    return {
        (record.kind, record.key): {
            **json.loads(record.to_json()),
            "time": None,
            "where": None,
            "values": {k: v for k, v in record.values.items() if k not in ("seconds", "memory")},
        }
        for record in found
    }


# -- configs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", experiments.table_names())
def test_every_table_builds_all_its_cells_at_every_scale(name):
    for scale in experiments.load_table(name).scales:
        cells = experiments.plan(experiments.resolve(name, scale))
        keys = [key for cell in cells for key in cell.keys]
        assert len(keys) == len(set(keys)) > 0
        assert len({cell.name for cell in cells}) == len(cells)
        made: set[str] = set()
        for cell in cells:  # in an order that works
            assert made.issuperset(cell.needs)
            made.update(cell.keys)


@pytest.mark.parametrize("name", experiments.table_names())
def test_a_printed_config_gives_the_same_study(name, tmp_path):
    for scale in experiments.load_table(name).scales:
        study = experiments.resolve(name, scale)
        (tmp_path / "again.yaml").write_text(study.to_yaml())
        again = experiments.resolve(str(tmp_path / "again.yaml"))
        assert again.protocol == study.protocol
        assert [cell.keys for cell in experiments.plan(again)] == [cell.keys for cell in experiments.plan(study)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"protcol": {}}, ["'protcol'", "did you mean 'protocol'?"]),
        ({"protocol": {**CONFIG["protocol"], "metods": []}}, ["'metods'", "did you mean 'methods'?"]),
        ({"scales": {"smoke": {"protocol": {"barrier": {"pionts": 3}}}}}, ["'pionts'", "barrier", "'points'"]),
        ({"scales": {"smoke": {"protocol": {"recipe": {"epcohs": 3}}}}}, ["'epcohs'", "recipe", "'epochs'"]),
        ({"scales": {"smoke": {"protocol": {"architectures": {"mlp": {"modle": "mlp"}}}}}}, ["'modle'", "'model'"]),
        ({"scales": {"huge": {}}}, ["'huge'", "smoke, cpu, gpu"]),
        ({"scales": {}}, ["scales"]),
        ({"kind": "fusoin"}, ["'fusoin'", "'fusion'"]),
        ({"title": None}, ["title"]),
        ({"protocol": {"dataset": "digits"}}, ["architectures is missing"]),
        ({"paper": [{"rows": []}]}, ["paper.0.source is missing"]),
        ({"scales": {"smoke": {"protocol": {"barrier": {"points": 1}}}}}, ["barrier", "1 points make no line"]),
        ({"scales": {"smoke": {"protocol": {"partitions": {"skew": {"alpha": 1}}}}}}, ["skew", "alpha"]),
    ],
)
def test_a_config_that_means_nothing_is_refused_with_file_and_key(change, words, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **change}))
    with pytest.raises(ConfigError) as caught:
        experiments.resolve(str(path), "smoke")
    for word in (str(path), *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": ["gamff"]}, ["unknown method 'gamff'"]),
        ({"methods": ["gamf sigmaa=2"]}, ["'sigmaa'"]),
        ({"methods": ["gamf sigma"]}, ["'sigma' is not KEY=VALUE"]),
        ({"repairs": ["mend"]}, ["unknown repair 'mend'"]),
        ({"samples": 0}, ["'refit' needs unlabelled inputs", "samples"]),
        ({"recipe": {"epochs": 3, "optimizer": "lion"}}, ["digits/homogeneous/mlp/N=2", "'lion'"]),
        ({"recipe": {}}, ["digits/homogeneous/mlp/N=2", "epochs"]),
        ({"architectures": {"mlp": {"model": "mpl"}}}, ["digits/homogeneous/mlp/N=2", "unknown model 'mpl'"]),
        ({"architectures": {"m": {"model": "mlp"}}}, ["digits/homogeneous/m/N=2", "(1, 8, 8)"]),
        ({"architectures": {"m": {"model": "mlp", "options": {"sizes": [64, 8, 5]}}}}, ["5 outputs", "10 classes"]),
        ({"architectures": {"m": {"model": "mlp", "options": {"size": [64]}}}}, ["no option 'size'"]),
    ],
)
def test_cells_that_cannot_be_built_are_named_before_anything_is_trained(change, words, tmp_path):
    path = changed(tmp_path / "own.yaml", **change)
    with pytest.raises(ConfigError) as caught:
        experiments.plan(experiments.resolve(path, "smoke"))
    for word in (path, *words):
        assert word in str(caught.value)


def test_unknown_tables_and_scales_are_refused():
    with pytest.raises(UsageError, match=r"unknown table 'mnst'.*did you mean 'mnist'"):
        experiments.resolve("mnst", "cpu")
    with pytest.raises(UsageError, match=r"unknown scale 'cup'.*did you mean 'cpu'"):
        experiments.resolve("mnist", "cup")
    with pytest.raises(UsageError, match="choose one with --scale"):
        experiments.resolve("mnist")
    with pytest.raises(ConfigError, match="cannot be read"):
        experiments.resolve("missing.yaml", "cpu")


# -- networks ----------------------------------------------------------------------------------------


def spec(**change: Any) -> NetworkSpec:
    values: dict[str, Any] = {
        "model": "mlp",
        "options": {"sizes": [64, 8, 10]},
        "dataset": "digits",
        "data": "",
        "recipe": Recipe(epochs=2, lr=0.01),
        "seed": 0,
    }
    return NetworkSpec(**{**values, **change})


def test_everything_that_makes_a_network_changes_its_key_and_nothing_else_does():
    other = [
        {"model": "lenet"},
        {"options": {"sizes": [64, 9, 10]}},
        {"dataset": "mnist"},
        {"data": "abc"},
        {"rows": 5},
        {"recipe": Recipe(epochs=3, lr=0.01)},
        {"seed": 1},
        {"scheme": "skew", "parts": 2},
        {"scheme": "skew", "parts": 3},
        {"scheme": "skew", "parts": 2, "scheme_options": {"share": 0.9}},
        {"threads": 2},
        {"device": "cuda"},
    ]
    assert {entry for change in other for entry in change} == {entry.name for entry in dataclasses.fields(NetworkSpec)}
    keys = [spec().key, *(spec(**change).key for change in other)]
    assert len(set(keys)) == len(keys)
    assert spec(options={"sizes": (64, 8, 10)}).key == spec().key


def test_a_cached_network_is_loaded_and_not_trained(tmp_path, monkeypatch):
    first = experiments.obtain(spec(), tmp_path)
    monkeypatch.setattr("weldnet.experiments._networks.train", None)
    again = experiments.obtain(spec(), tmp_path)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    assert (again.scores, again.history, again.seconds) == (first.scores, first.history, first.seconds)
    assert len(first.history) == 2


def _other_weights(weights: Path, about: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({k: t + 1 for k, t in load_file(weights).items()}, weights)


def _other_shape(weights: Path, about: Path) -> None:
    from safetensors.torch import save_file

    from weldnet.checkpoints import tensors_sha256

    state = {"layers.0.weight": torch.zeros(9, 64)}
    save_file(state, weights)
    about.write_text(json.dumps({**json.loads(about.read_text()), "tensors_sha256": tensors_sha256(state)}))


def _other_spec(weights: Path, about: Path) -> None:
    document = json.loads(about.read_text())
    document["spec"]["seed"] = 7
    about.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "spoil",
    [
        _other_weights,
        _other_shape,
        _other_spec,
        lambda weights, about: weights.write_bytes(b"half"),
        lambda weights, about: about.write_text("{"),
    ],
)
def test_a_cached_network_that_no_longer_fits_is_trained_again_and_that_is_said(spoil, tmp_path):
    first = experiments.obtain(spec(), tmp_path)
    key = spec().key
    spoil(tmp_path / f"{key}.safetensors", tmp_path / f"{key}.json")
    said: list[str] = []
    again = experiments.obtain(spec(), tmp_path, say=said.append)
    assert len(said) == 1
    assert "training it again" in said[0]
    assert key in said[0]
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    assert experiments.obtain(spec(), tmp_path, say=said.append).scores == first.scores
    assert len(said) == 1


def test_a_training_state_that_cannot_be_used_is_said_and_replaced(tmp_path):
    (tmp_path / f"{spec().key}.state").write_bytes(b"torn")
    said: list[str] = []
    experiments.obtain(spec(), tmp_path, say=said.append)
    assert "training from the start" in said[0]
    assert not list(tmp_path.glob("*.state"))


def test_the_networks_of_a_split_share_out_all_rows_and_the_index_file_says_how(whole):
    files = list((whole / "partitions").glob("*.npz"))
    assert [file.name for file in files] == ["digits-skew-2-split0.npz"]
    with np.load(files[0]) as arrays:
        parts = [arrays["part0"], arrays["part1"]]
        about = json.loads(str(arrays["about"]))
    labels = data.load("digits", split="train").labels
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    expected = data.partition(labels, 2, "skew", seed=0)
    assert all(np.array_equal(mine, theirs.numpy()) for mine, theirs in zip(parts, expected, strict=True))
    assert about["scheme"] == "skew"
    assert about["data"] == data.identify("digits", split="train").sha256


@pytest.mark.parametrize("spoilt", [b"", b"PK\x03\x04 torn", b"no archive"])
def test_an_index_file_that_is_spoilt_is_written_again(spoilt, tmp_path):
    parts = [torch.tensor([0, 2]), torch.tensor([1, 3])]
    path = save_partition(tmp_path, "split0", parts, {"seed": 0})
    path.write_bytes(spoilt)
    assert save_partition(tmp_path, "split0", parts, {"seed": 0}) == path
    with np.load(path) as arrays:
        assert arrays["part1"].tolist() == [1, 3]


# -- runs --------------------------------------------------------------------------------------------


def test_a_run_has_records_of_all_kinds_with_the_words_of_its_cells(whole, study):
    found = records.read(whole)
    assert not (whole / "states").exists()
    (head,) = found.of("run")
    assert head.extra["scale"] == "smoke"
    assert head.extra["notes"] == []
    assert [record.source for record in found.of("published")] == ["somewhere"]
    networks = found.of("network", partition="skew")
    assert len(networks) == 2
    assert all(len(record.extra["history"]) == 3 and record.values["accuracy"] > 0.1 for record in networks)
    wanted = {key for cell in experiments.plan(study, data=_identities()) for key in cell.keys}
    assert wanted == {record.key for record in found.of("network", "result", "curve", "couplings")}
    (one,) = found.of("result", method="gamf", partition="homogeneous", repair="refit", stage="one-shot")
    assert set(one.values) >= {"accuracy", "loss", "calibration_error", "barrier", "seconds", "memory", "samples"}
    assert one.values["samples"] == 64
    assert all(len(pair) == 2 for pair in one.extra["variances"].values())
    assert len(one.extra["variances"]) == 2
    (tuned,) = found.of("result", method="gamf", partition="homogeneous", stage="fine-tuned")
    assert len(tuned.extra["history"]) == 2
    curve = found.of("curve", method="gamf", partition="skew")[0]
    assert curve.extra["x"] == [0.0, 0.5, 1.0]
    assert len(curve.extra["y"]["loss"]) == 3
    (couplings,) = found.of("couplings", partition="skew")
    assert np.array(couplings.extra["spaces"]["layers.0"]["matrix"]).sum() == 8


def _identities() -> dict[tuple[str, str], data.Identity]:
    return {("digits", split): data.identify("digits", split=split) for split in ("train", "test")}


def test_the_numbers_are_those_of_the_networks(whole):
    found = records.read(whole)
    scores = [r.values["accuracy"] for r in found.of("network", partition="homogeneous")]
    (individual,) = found.of("result", method="individual", partition="homogeneous")
    assert individual.values["accuracy"] == pytest.approx(sum(scores) / 2, abs=1e-12)


def test_a_run_that_was_cut_anywhere_goes_on_to_the_same_records(whole, study, tmp_path):
    text = (whole / records.FILE).read_bytes()
    lines = text.splitlines(keepends=True)
    for cut in (len(lines[0]) + 7, len(text) // 3, len(text) - 5):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / records.FILE).write_bytes(text[:cut])
        done = experiments.run_study(study, folder, resume=True, cache=whole / "networks")
        assert not done.failed
        assert 0 < done.worked <= done.cells
        assert measured(records.read(folder)) == measured(records.read(whole))


def test_processes_give_the_same_records_as_one(whole, study, tmp_path):
    done = experiments.run_study(study, tmp_path / "run", executor=Local(2))
    assert not done.failed
    assert measured(records.read(tmp_path / "run")) == measured(records.read(whole))


def test_a_finished_run_has_nothing_to_do(whole, study):
    before = (whole / records.FILE).read_bytes()
    assert experiments.run_study(study, whole, resume=True).worked == 0
    assert (whole / records.FILE).read_bytes() == before


def test_a_corrupt_line_is_skipped_counted_said_and_made_again(whole, study, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lines = (whole / records.FILE).read_text().splitlines()
    spoilt = next(number for number, line in enumerate(lines) if '"result"' in line)
    lines[spoilt] = lines[spoilt][:40]
    (folder / records.FILE).write_text("\n".join(lines) + "\n")
    heard = Heard()
    done = experiments.run_study(study, folder, resume=True, cache=whole / "networks", observer=heard)
    assert (done.corrupt, done.worked) == (1, 1)
    assert any("1 corrupt line skipped" in text for text in heard.said)
    assert measured(records.read(folder)) == measured(records.read(whole))


def test_a_folder_with_a_run_is_not_written_over(whole, study, config):
    with pytest.raises(UsageError, match="go on with --resume"):
        experiments.run_study(study, whole)
    with pytest.raises(UsageError, match="other settings"):
        experiments.run_study(experiments.resolve(config, "cpu"), whole, resume=True)


def test_two_runs_in_one_folder_at_once_are_refused(study, tmp_path):
    class Meanwhile:
        """Starts a second run while the first one works."""

        error: Exception | None = None

        def map(self, cells: Sequence[Cell], context: Context, watch: Watch) -> Generator[Outcome]:
            if self.error is None:
                with pytest.raises(RecordError) as caught:
                    experiments.run_study(study, tmp_path, resume=True)
                self.error = caught.value
            yield from ()

    executor = Meanwhile()
    experiments.run_study(study, tmp_path, executor=executor)
    assert f"process {os.getpid()}" in str(executor.error)


def test_only_some_cells_are_worked_on_with_what_they_need(study, tmp_path):
    cells = experiments.plan(study, {"method": ["gamf"], "repair": ["none"], "partition": ["skew"]})
    assert [cell.name.split("/")[-1] for cell in cells] == ["seed0", "seed1", "gamf"]
    assert {made.words["stage"] for made in cells[-1].makes} == {"one-shot", "fine-tuned"}
    for filters, words in (({"methd": ["x"]}, "unknown word 'methd'"), ({"method": ["x"]}, "method is ")):
        with pytest.raises(UsageError, match=words):
            experiments.plan(study, filters)


def test_a_federated_study_is_filtered_by_words_of_its_own():
    federated = experiments.resolve("federated-matching", "smoke")
    last = experiments.plan(federated, {"round": ["2"]})
    assert {made.words["round"] for cell in last for made in cell.makes} == {2}
    with pytest.raises(UsageError, match=r"unknown word 'seed'; the cells of this study have .*method.*round"):
        experiments.plan(federated, {"seed": ["0"]})


def test_a_combination_that_fails_is_a_record_with_its_reason_and_is_tried_again(tmp_path):
    path = changed(
        tmp_path / "own.yaml",
        architectures={
            "m": {"model": "mlp", "options": {"sizes": [64, 8, 10]}, "others": {"sizes": [64, 12, 10]}},
        },
        partitions={"homogeneous": {}},
        methods=["naive", "gamf", "optimal_transport", "fold"],
        repairs=["none"],
        couplings=[],
    )
    study = experiments.resolve(path, "smoke")
    done = experiments.run_study(study, tmp_path / "run")
    assert [name.split("/")[-1] for name in done.failed] == ["gamf"]
    found = records.read(tmp_path / "run")
    assert "optimal_transport" in found.of("result", method="gamf", stage="one-shot")[0].extra["error"]
    for method in ("naive", "optimal_transport", "fold"):
        assert 0 <= found.of("result", method=method)[0].values["accuracy"] <= 1
    assert experiments.run_study(study, tmp_path / "run", resume=True).worked == 1


# -- a dataset that is not there -------------------------------------------------------------------


def test_a_dataset_that_is_not_there_says_what_to_download_and_where_to_put_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WELDNET_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "cifar100-vgg11", "--scale", "smoke", "-o", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert "https://huggingface.co/datasets/uoft-cs/cifar100" in said
    assert "$WELDNET_DATA/cifar100/" in said
    assert not (tmp_path / "run").exists()


# -- what happens to a run ----------------------------------------------------------------------------


def _killer(times: int) -> tuple[Watch, list[str]]:
    """Kill the worker that finished an epoch, so many times."""
    said: list[str] = []
    left = [times]

    def kill(cell: Cell, share: float) -> None:
        if left[0]:
            left[0] -= 1
            for process in multiprocessing.active_children():
                os.kill(process.pid or 0, signal.SIGKILL)

    return Watch(lambda cell, text: said.append(text), kill), said


@pytest.mark.parametrize("times", [1, 9])
def test_a_killed_worker_is_noticed_its_cell_tried_once_more_and_then_recorded(times, study, tmp_path):
    (tmp_path / "networks").mkdir()
    cell = experiments.plan(study, data=_identities())[0]
    context = Context(study, tmp_path, tmp_path / "networks", _identities())
    watch, said = _killer(times)
    (outcome,) = Local(2).map([cell], context, watch)
    assert len(said) == 1
    assert "SIGKILL" in said[0]
    assert "trying once more" in said[0]
    if times == 1:  # it went on after the epoch that was done
        assert outcome.error == ""
        assert len(outcome.records[0].extra["history"]) == 3
    else:
        assert "SIGKILL" in outcome.error


def test_a_run_that_is_killed_goes_on_to_the_records_of_an_unbroken_one(whole, config, tmp_path):
    command = [sys.executable, "-c", "import sys; from weldnet.cli import main; sys.exit(main())", "reproduce", config]
    command += ["--scale", "smoke", "-o", str(tmp_path / "run"), "--workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (tmp_path / "run" / records.FILE).exists() or len(records.read(tmp_path / "run")) < 7:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = len(records.read(tmp_path / "run"))
    assert before < len(records.read(whole))
    done = experiments.run_study(experiments.resolve(config, "smoke"), tmp_path / "run", resume=True)
    assert not done.failed
    assert measured(records.read(tmp_path / "run")) == measured(records.read(whole))


def test_an_interrupt_says_how_to_go_on(config, tmp_path, capsys, monkeypatch):
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("weldnet.experiments.Local.map", interrupted)
    folder = tmp_path / "run"
    assert main(["reproduce", config, "--scale", "smoke", "-o", str(folder)]) == 130
    said = capsys.readouterr().err
    assert str(folder) in said
    assert "--resume" in said


@pytest.mark.parametrize("limit", [2_000, 25_000])
def test_a_full_disk_stops_the_run_with_one_line_and_leaves_it_whole(limit, whole, study, tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(WeldnetError) as caught:
            experiments.run_study(study, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    if (tmp_path / "run" / records.FILE).exists():
        assert records.read(tmp_path / "run").corrupt == 0
    experiments.run_study(study, tmp_path / "run", resume=(tmp_path / "run" / "config.yaml").exists())
    assert measured(records.read(tmp_path / "run")) == measured(records.read(whole))


# -- data that is missing, small or not what its name says --------------------------------------------


def write_pictures(folder: Path, column: str, size: int, labels: dict[str, int], splits: dict[str, int]) -> None:
    """Write random pictures in the layout of the hub, every class once and again."""
    from PIL import Image
    from pyarrow import Table, parquet

    random = np.random.default_rng(0)
    folder.mkdir()
    for split, rows in splits.items():
        encoded = []
        for _ in range(rows):
            stream = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (size, size, 3), np.uint8)).save(stream, "PNG")
            encoded.append({"bytes": stream.getvalue(), "path": None})
        columns = {name: [row % classes for row in range(rows)] for name, classes in labels.items()}
        parquet.write_table(Table.from_pydict({column: encoded, **columns}), folder / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize(
    ("table", "name", "layout"),
    [
        (
            "cifar100-vgg11",
            "cifar100",
            ("img", 32, {"fine_label": 100, "coarse_label": 20}, {"train": 200, "test": 100}),
        ),
        ("tiny-imagenet", "tiny-imagenet", ("image", 64, {"label": 200}, {"train": 200, "valid": 200})),
    ],
)
def test_tables_run_on_folders_in_the_hubs_layout_marked_as_synthetic(table, name, layout, tmp_path, monkeypatch):
    monkeypatch.setenv("WELDNET_DATA", str(tmp_path))
    monkeypatch.setenv("WELDNET_CACHE", str(tmp_path / "cache"))
    write_pictures(tmp_path / name, *layout)
    study = experiments.resolve(table, "smoke")
    only = {"method": ["individual", "ensemble", "gamf"], "partition": ["homogeneous"], "architecture": ["vgg11"]}
    done = experiments.run_study(study, tmp_path / "run", only=only)
    assert not done.failed
    found = records.read(tmp_path / "run")
    assert "synthetic data" in found.of("run")[0].extra["title"]
    assert any("synthetic data" in note for note in found.of("run")[0].extra["notes"])
    measured_ones = found.of("network", "result", "curve", "couplings")
    assert len(measured_ones) > 5
    assert all(record.cell["dataset"] == f"{name} (synthetic data)" for record in measured_ones)
    assert all(line.ours("accuracy") == "" for line in experiments.summarise(tmp_path / "run") if line.quoted)


def test_the_datasets_own_rows_are_not_called_synthetic():
    assert all(identity.synthetic == "" for identity in _identities().values())


@pytest.mark.data
def test_real_data_is_not_called_synthetic(data_root, monkeypatch):
    monkeypatch.setenv("WELDNET_DATA", str(data_root))
    for name in ("mnist", "cifar10"):
        for split in ("train", "test"):
            assert data.identify(name, split=split).synthetic == ""


@pytest.mark.parametrize("name", [n for n in experiments.table_names() if experiments.load_table(n).kind == "fusion"])
def test_every_network_of_the_papers_size_takes_a_step_of_its_recipe(name):
    """On a few random images and this processor: what a GPU would be given is not wrong in itself."""
    study = experiments.resolve(name, "gpu")
    cells = experiments.plan(study)
    specs = {(c.work.spec.model, str(c.work.spec.options)): c.work.spec for c in cells if hasattr(c.work, "spec")}
    _, shape, classes = data.KNOWN_SIZES[study.protocol.dataset]
    generator = torch.Generator().manual_seed(0)
    few = data.Split(
        torch.randn(4, *shape, generator=generator), torch.tensor([0, 1, 2, classes - 1]), ("",) * classes, "few"
    )
    for made in specs.values():
        before = made.build()
        recipe = dataclasses.replace(made.recipe, epochs=1, batch_size=4)
        found = train(before, few, recipe, progress=False)
        assert np.isfinite(found.history[0].loss)
        assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), found.model.parameters(), strict=True))


# -- the command line -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mnst", "--scale", "cpu"], "unknown table 'mnst' (did you mean 'mnist'?)"),
        (["mnist", "--scale", "cup"], "unknown scale 'cup' (did you mean 'cpu'?)"),
        (["mnist"], "choose one with --scale"),
        ([], "needs a TABLE"),
        (["mnist", "--scale", "smoke", "--only", "method"], "is not KEY=VALUE"),
        (["mnist", "--scale", "smoke", "--only", "mehtod=x", "--list"], "unknown word 'mehtod'"),
        (["mnist", "--scale", "smoke", "--device", "tpu"], "'tpu' is unknown"),
    ],
)
def test_wrong_usage_is_one_line(words, said, capsys):
    assert main(["reproduce", *words]) == 2
    found = capsys.readouterr()
    assert said in found.err
    assert found.err.count("\n") == 1
    assert found.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_scale_for_a_gpu_is_refused_where_there_is_none(tmp_path, capsys):
    assert main(["reproduce", "mnist", "--scale", "gpu", "-o", str(tmp_path / "run")]) == 2
    assert "device 'cuda' cannot be used here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_prints_ours_beside_the_papers(whole, config, capsys):
    assert main(["reproduce", config, "--scale", "smoke", "-o", str(whole), "--resume", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["cells"], document["worked"], document["failed"]) == (10, 0, {})
    (row,) = [r for r in document["rows"] if r["method"] == "individual" and r["partition"] == "skew"]
    assert 0 < row["mean"]["accuracy"] < 1
    assert main(["reproduce", config, "--scale", "smoke", "-o", str(whole), "--resume"]) == 0
    assert "digits, skew, mlp, 2 networks" in capsys.readouterr().out


def test_tables_and_cells_are_listed(capsys):
    assert main(["reproduce", "mnist", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["tables"]
    assert [entry["scale"] for entry in listed] == ["smoke", "cpu", "gpu"]
    assert listed[0]["core_seconds"] < listed[1]["core_seconds"] < listed[2]["core_seconds"]
    assert main(["reproduce", "mnist", "--scale", "smoke", "--list", "--only", "method=gamf"]) == 0
    out = capsys.readouterr().out
    assert "group0/gamf" in out
    assert "naive" not in out
