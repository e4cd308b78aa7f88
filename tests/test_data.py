from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from weldnet import data
from weldnet.data import Split, load
from weldnet.errors import DataError, UsageError

datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("WELDNET_CACHE", str(folder))
    return folder


def pixels(count: int, size: tuple[int, ...] = (6, 5, 3), seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, size, dtype=np.uint8) for _ in range(count)]


def png(array: np.ndarray) -> dict[str, object]:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def write(
    path: Path,
    arrays: list[np.ndarray],
    labels: list,
    image: str = "image",
    label: str = "label",
    named: bool = True,
) -> Path:
    """Write a Parquet file in the hub's layout (`named`), or one without any feature metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {image: [png(array) for array in arrays], label: labels}
    if named:
        classes = datasets.ClassLabel(names=["cat", "dog", "emu"])
        features = datasets.Features({image: datasets.Image(), label: classes})
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(("image", "label", "named"), [("image", "label", True), ("img", "fine_label", False)])
def test_a_parquet_folder_is_read_as_it_was_written(tmp_path, image, label, named):
    arrays = pixels(4)
    write(tmp_path / "set" / "test.parquet", arrays, [0, 2, 1, 2], image, label, named)
    split = load(tmp_path / "set")
    expected = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255 * 2 - 1
    torch.testing.assert_close(split.images, expected)
    assert split.images.is_contiguous()
    assert split.labels.tolist() == [0, 2, 1, 2]
    assert split.labels.dtype == torch.int64
    assert split.classes == (("cat", "dog", "emu") if named else ("0", "1", "2"))


def test_shards_are_read_in_order_and_one_level_down(tmp_path):
    for shard, label in ((1, 1), (0, 0)):
        write(tmp_path / "set" / "plain" / f"train-0000{shard}-of-00002.parquet", pixels(2), [label] * 2)
    assert load(tmp_path / "set", split="train").labels.tolist() == [0, 0, 1, 1]


def test_a_validation_file_serves_as_test_split(tmp_path):
    write(tmp_path / "valid-00000-of-00001.parquet", pixels(2), [0, 1])
    assert len(load(tmp_path)) == 2


def test_a_named_dataset_is_found_in_weldnet_data_and_normalised_with_its_constants(tmp_path, monkeypatch):
    monkeypatch.setenv("WELDNET_DATA", str(tmp_path))
    write(tmp_path / "cifar100" / "test.parquet", [np.full((4, 4, 3), 51, np.uint8)], [0], "img", "fine_label")
    expected = [(0.2 - 0.5071) / 0.2673, (0.2 - 0.4865) / 0.2564, (0.2 - 0.4409) / 0.2762]
    assert load("cifar100").images[0, :, 0, 0].tolist() == pytest.approx(expected)


def test_a_named_dataset_is_found_beside_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("WELDNET_DATA", raising=False)
    write(tmp_path / "shared" / "data" / "tiny-imagenet" / "test.parquet", pixels(1), [0])
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert load("tiny-imagenet").images.shape == (1, 3, 6, 5)


def test_grey_pictures_have_one_channel_and_mixed_ones_three(tmp_path):
    write(tmp_path / "grey" / "test.parquet", pixels(2, (6, 5)), [0, 1])
    write(tmp_path / "mixed" / "test.parquet", pixels(1, (6, 5)) + pixels(1), [0, 1])
    assert load(tmp_path / "grey").images.shape == (2, 1, 6, 5)
    assert load(tmp_path / "mixed").images.shape == (2, 3, 6, 5)


def test_a_limit_takes_evenly_spaced_rows(tmp_path):
    write(tmp_path / "test.parquet", pixels(6), [0, 0, 1, 1, 2, 2])
    assert load(tmp_path, limit=3).labels.tolist() == [0, 1, 2]
    assert len(load(tmp_path, limit=60)) == 6


def test_the_cache_is_used_rebuilt_when_broken_and_renewed_when_the_file_changes(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "test.parquet", pixels(3), [0, 1, 2])
    first = load(tmp_path)
    (kept,) = cache.iterdir()
    monkeypatch.setattr(datasets.Dataset, "from_parquet", lambda *_, **__: pytest.fail("decoded again"))
    torch.testing.assert_close(load(tmp_path).images, first.images)
    monkeypatch.undo()
    monkeypatch.setenv("WELDNET_CACHE", str(cache))
    for broken in (b"", b"PK\x03\x04 broken", kept.read_bytes()[:-30]):
        kept.write_bytes(broken)
        torch.testing.assert_close(load(tmp_path).images, first.images)
        assert kept.stat().st_size > 100
    write(path, pixels(3, seed=1), [0, 1, 1])
    assert load(tmp_path).labels.tolist() == [0, 1, 1]
    assert not list(cache.glob("*.tmp"))


def test_a_cache_folder_that_cannot_be_made_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("WELDNET_CACHE", str(tmp_path / "file" / "cache"))
    write(tmp_path / "test.parquet", pixels(2), [0, 1])
    assert len(load(tmp_path)) == 2


def test_digits_are_split_without_overlap():
    train, test = load("digits", split="train"), load("digits")
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape[1:] == (1, 8, 8)
    assert abs(train.images.mean()) < 0.01
    assert abs(train.images.std() - 1) < 0.01
    torch.testing.assert_close(load("digits").images, test.images, rtol=0, atol=0)
    rows = torch.cat([train.images, test.images]).flatten(1)
    assert len(rows.unique(dim=0)) == 1797
    assert set(test.labels.tolist()) == set(range(10))


def test_a_split_is_a_pytorch_dataset():
    split = load("digits", limit=10)
    images, labels = next(iter(torch.utils.data.DataLoader(split, batch_size=4)))
    torch.testing.assert_close(images, split.images[:4])
    torch.testing.assert_close(labels, split.labels[:4])


def no_label(folder: Path) -> None:
    datasets.Dataset.from_dict({"image": [png(pixels(1)[0])], "answer": [1]}).to_parquet(folder / "test.parquet")


def no_image(folder: Path) -> None:
    datasets.Dataset.from_dict({"picture": [1], "label": [1]}).to_parquet(folder / "test.parquet")


def broken_image(folder: Path) -> None:
    row = {"bytes": b"no picture", "path": None}
    datasets.Dataset.from_dict({"image": [row], "label": [1]}).to_parquet(folder / "test.parquet")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, ["test.parquet", "no test split"]),
        (lambda folder: (folder / "test.parquet").write_bytes(b"no"), ["test.parquet", "Parquet"]),
        (lambda folder: write(folder / "test.parquet", [], [], named=False), ["no rows"]),
        (
            lambda folder: write(folder / "test.parquet", pixels(1) + pixels(1, (7, 5, 3)), [0, 1]),
            ["5x6", "5x7"],
        ),
        (
            lambda folder: write(folder / "test.parquet", pixels(1), ["a"], named=False),
            ["'label'", "integer"],
        ),
        (lambda folder: write(folder / "test.parquet", pixels(1), [-1], named=False), ["-1"]),
        (no_label, ["no label column", "answer"]),
        (no_image, ["no image column", "picture"]),
        (broken_image, ["unreadable image"]),
    ],
)
def test_bad_folders_are_refused_in_one_line(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["nowhere", "/no/such/folder", "./nothing"])
def test_unknown_sources_are_refused_with_what_is_known(source):
    with pytest.raises(DataError, match=r"not a folder or a known dataset.*digits, mnist, cifar10"):
        load(source)


@pytest.mark.parametrize("source", ["cifar100", "someone/something"])
def test_an_unreachable_hub_is_reported_at_once_with_the_places_looked_at(source, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("WELDNET_DATA", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(DataError, match="unreachable") as caught:
        load(source)
    assert source in str(caught.value)
    assert "WELDNET_DATA" in str(caught.value)


def test_a_hub_dataset_is_read_with_its_own_split_name(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.parquet", pixels(3), [0, 1, 2])
    table = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "arrow"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train", "valid"])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: {"someone/pets valid": table}[f"{name} {split}"])
    split = load("someone/pets")
    assert split.labels.tolist() == [0, 1, 2]
    assert split.name == "someone/pets"


def test_wrong_arguments_are_refused():
    with pytest.raises(UsageError, match="'val'"):
        load("digits", split="val")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="limit 0"):
        load("digits", limit=0)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(0, 1, 2, 2), torch.zeros(0, dtype=torch.long)),
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)),
        (torch.zeros(2, 1, 2, 2), torch.zeros(3, dtype=torch.long)),
        (torch.zeros(2, 1, 2, 2), torch.zeros(2)),
        (torch.zeros(2, 1, 2, 2), torch.tensor([0, 2])),
    ],
)
def test_a_split_that_does_not_fit_together_is_refused(images, labels):
    with pytest.raises(DataError, match="made up"):
        Split(images, labels, ("a", "b"), "made up")


def test_importing_the_package_imports_no_reader():
    code = "import weldnet.data, sys; assert not {'datasets', 'sklearn', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})


@pytest.mark.data
@pytest.mark.parametrize(("name", "shape"), [("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32))])
def test_the_real_test_splits_are_whole_and_normalised(name, shape, data_root, monkeypatch):
    monkeypatch.setenv("WELDNET_DATA", str(data_root))
    split = load(name)
    assert split.images.shape == (10_000, *shape)
    assert name in data.NAMES
    assert len(split.classes) == 10
    assert abs(split.images.mean()) < 0.05
    assert abs(split.images.std() - 1) < 0.05
    assert split.labels.bincount().min() > 800


# -- partitions --------------------------------------------------------------------------------------

LABELS = torch.arange(2000) % 10


@pytest.mark.parametrize("scheme", data.SCHEMES)
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_every_row_goes_to_one_part(scheme, parts):
    found = data.partition(LABELS, parts, scheme, seed=3)
    assert len(found) == parts
    assert torch.equal(torch.cat(found).sort().values, torch.arange(2000))
    again = data.partition(LABELS, parts, scheme, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    if parts > 1:
        other = data.partition(LABELS, parts, scheme, seed=4)
        assert not all(torch.equal(a, b) for a, b in zip(found, other, strict=True))


def test_skewed_parts_have_their_share_of_their_classes():
    for part, rows in enumerate(data.partition(LABELS, 2, "skew", share=0.8)):
        counts = torch.bincount(LABELS[rows], minlength=10)
        assert counts.tolist() == [160 if label % 2 == part else 40 for label in range(10)]


def test_dirichlet_parts_are_uneven_in_class_and_nearly_even_in_size():
    uneven = data.partition(LABELS, 4, "dirichlet", alpha=0.1)
    counts = torch.stack([torch.bincount(LABELS[rows], minlength=10) for rows in uneven]).double()
    assert float((counts / counts.sum(0)).amax(0).mean()) > 0.75
    assert all(10 <= len(rows) <= 2000 / 4 + 200 for rows in uneven)


def test_shards_hold_few_classes():
    for rows in data.partition(LABELS, 5, "shards", shards=2):
        assert len(LABELS[rows].unique()) <= 2


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"scheme": "round"}, UsageError, "unknown partition 'round'; choose iid"),
        ({"parts": 0}, UsageError, "parts is 0"),
        ({"parts": 3000}, DataError, "2000 rows cannot be split among 3000"),
        ({"scheme": "dirichlet", "alpha": 0.0}, UsageError, "alpha is 0.0"),
        ({"scheme": "dirichlet", "smallest": 1500}, DataError, "2000 rows are fewer than 1500"),
        ({"scheme": "skew", "share": 1.5}, UsageError, "share is 1.5"),
        ({"scheme": "skew", "share": 1.0, "parts": 11}, DataError, "without rows"),
    ],
)
def test_partitions_that_cannot_be_are_refused(options, error, says):
    with pytest.raises(error, match=says):
        data.partition(LABELS, **{"parts": 2, **options})
