"""Decode pictures to one uint8 array, once: the result is kept in a cache folder."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weldnet.errors import DataError

if TYPE_CHECKING:
    import datasets

_log = logging.getLogger(__name__)
_FORMAT = 1
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "fine_label")


@dataclass(frozen=True, eq=False)
class Pixels:
    """Decoded pictures: uint8 (N, H, W, C), int64 labels (N,) and the class names."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]


def read_parquet(files: list[Path], name: str) -> Pixels:
    """Decode Parquet files with an image and a label column, or take the decoded copy from the cache.

    Raises:
        DataError: if a file cannot be read, a column is missing, there are no rows, or the sizes differ.
    """

    def read() -> Pixels:
        import datasets
        from pyarrow import parquet

        with tempfile.TemporaryDirectory(prefix="weldnet-") as scratch, _quiet():
            try:
                if not sum(parquet.read_metadata(file).num_rows for file in files):
                    raise DataError(f"{files[0]} has no rows; give a split with at least one image")
                table = datasets.Dataset.from_parquet(
                    [str(file) for file in files], cache_dir=scratch, keep_in_memory=True
                )
            except DataError:
                raise
            except Exception as error:
                raise DataError(f"{files[0]} cannot be read as Parquet ({_first_line(error)})") from error
            assert isinstance(table, datasets.Dataset)
            return _decode(table, name)

    return _cached(files, read)


def read_hub(repository: str, names: Iterable[str], why: str) -> Pixels:
    """Download one split from the Hugging Face hub and decode it; `names` are the split's possible names.

    Raises:
        DataError: if the hub cannot be reached or lacks the dataset; the message starts with `why`.
    """
    import datasets

    if not os.environ.get("HF_HUB_OFFLINE"):
        _check_reachable(repository, why)
    try:
        with _quiet():
            found = datasets.get_dataset_split_names(repository)
            split = next((name for name in names if name in found), None)
            if split is None:
                raise DataError(f"{repository} on the hub has no such split; it has: {', '.join(found)}")
            table = datasets.load_dataset(repository, split=split)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{why}, and {repository} cannot be read from the hub ({_first_line(error)})") from error
    assert isinstance(table, datasets.Dataset)
    files = [Path(entry["filename"]) for entry in table.cache_files]
    return _cached(files, lambda: _decode(table, repository))


def _check_reachable(repository: str, why: str) -> None:
    """Fail within seconds where the hub cannot be reached; `datasets` itself retries for half a minute."""
    from huggingface_hub import constants

    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError) as error:
        raise DataError(
            f"{why}, and {constants.ENDPOINT} with {repository} is unreachable ({error}); "
            "HF_HUB_OFFLINE=1 uses the copies in the hub's own cache"
        ) from error


def cache_folder() -> Path:
    """Return the folder of decoded copies: $WELDNET_CACHE, or ~/.cache/weldnet."""
    return Path(os.environ.get("WELDNET_CACHE") or "~/.cache/weldnet").expanduser()


def _decode(table: datasets.Dataset, name: str) -> Pixels:
    import datasets
    from PIL import Image

    image_column = _pick(table, _IMAGE_COLUMNS, "image", name)
    label_column = _pick(table, _LABEL_COLUMNS, "label", name)
    if not len(table):
        raise DataError(f"{name}: there are no rows; give a split with at least one image")
    encoded = table.cast_column(image_column, datasets.Image(decode=False))[image_column]
    try:
        pictures = [Image.open(io.BytesIO(row["bytes"]) if row["bytes"] else row["path"]) for row in encoded]
        width, height = pictures[0].size
        for index, picture in enumerate(pictures):
            if picture.size != (width, height):
                sizes = f"{width}x{height} in row 0, {picture.width}x{picture.height} in row {index}"
                raise DataError(f"{name}: images differ in size ({sizes}); resize them to one size first")
        mode = "L" if all(picture.mode in ("1", "L") for picture in pictures) else "RGB"
        images = np.empty((len(pictures), height, width, len(mode)), np.uint8)
        for index, picture in enumerate(pictures):
            images[index] = np.asarray(picture.convert(mode)).reshape(height, width, len(mode))
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{name}: column {image_column!r} has an unreadable image ({_first_line(error)})") from error
    labels, classes = _labels(table, label_column, name)
    return Pixels(images, labels, classes)


def _labels(table: datasets.Dataset, column: str, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    try:
        labels = np.asarray(table[column][:], dtype=np.int64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: column {column!r} must hold integer labels ({_first_line(error)})") from error
    names = getattr(table.features[column], "names", None)
    return labels, tuple(names or (str(index) for index in range(int(labels.max()) + 1)))


def _pick(table: datasets.Dataset, wanted: tuple[str, ...], kind: str, name: str) -> str:
    for column in wanted:
        if column in table.column_names:
            return column
    have, expected = ", ".join(table.column_names), " or ".join(repr(column) for column in wanted)
    raise DataError(f"{name}: no {kind} column; it has {have}, rename one to {expected}")


def _cached(files: list[Path], read: Callable[[], Pixels]) -> Pixels:
    """Return what `read` gives, or its intact copy; copies are keyed by the files' paths, sizes and times."""
    stats: list[Any] = [_FORMAT]
    for file in files:
        stat = file.stat()
        stats.append([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    path = cache_folder() / f"{hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:32]}.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Pixels(arrays["images"], arrays["labels"], tuple(arrays["classes"].tolist()))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        _log.warning("rebuilding the broken cache file %s (%s)", path, error)
    pixels = read()
    try:
        _write(path, pixels)
    except OSError as error:
        _log.warning("the decoded images could not be kept in %s (%s)", path.parent, error)
    return pixels


def _write(path: Path, pixels: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            np.savez(stream, images=pixels.images, labels=pixels.labels, classes=np.array(pixels.classes))
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars of `datasets`, which would mix with ours."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
