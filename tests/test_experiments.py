"""Studies: strict configs, cells by hash, a runner that can be stopped anywhere, networks that are what they say."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from weldnet import data, experiments, records
from weldnet.cli import main
from weldnet.errors import ConfigError, RecordError, UsageError
from weldnet.experiments import Cell, Context, Local, NetworkSpec, Observer, Outcome, Study, Watch
from weldnet.records import Records
from weldnet.training import Recipe

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


# -- runs --------------------------------------------------------------------------------------------


def test_a_run_has_records_of_all_kinds_with_the_words_of_its_cells(whole, study):
    found = records.read(whole)
    (head,) = found.of("run")
    assert head.extra["scale"] == "smoke"
    assert head.extra["notes"] == []
    assert [record.source for record in found.of("published")] == ["somewhere"]
    networks = found.of("network", partition="skew")
    assert len(networks) == 2
    assert all(len(record.extra["history"]) == 3 and record.values["accuracy"] > 0.1 for record in networks)
    wanted = {key for cell in experiments.plan(study, data=_identities()) for key in cell.keys}
    assert wanted == {record.key for record in found.of("network", "result")}
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


# -- data that is missing, small or not what its name says --------------------------------------------


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
