"""Networks of a study: what makes one, and a cache of the trained ones by the hash of that."""

from __future__ import annotations

import fcntl
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, final

from torch import nn

from weldnet import data, models
from weldnet.checkpoints import atomic_path, load, load_into, provenance, save, tensors_sha256
from weldnet.data import Scheme, Split
from weldnet.errors import CheckpointError, TrainingError
from weldnet.evaluation import evaluate
from weldnet.experiments._cells import hashed, here
from weldnet.experiments._data import load_split, save_partition
from weldnet.training import Recipe, initialise, train

__all__ = ["NetworkSpec", "Trained", "obtain"]

_FORMAT = 1


@final
@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """Everything that decides a trained network's weights, and nothing else.

    Of ``parts`` networks with a ``scheme``, seed k sees part ``k % parts`` of split number ``k // parts``; without one
    every network sees all rows.

    Args:
        model: a name of ``weldnet.models``.
        options: of its factory.
        dataset: a source of ``weldnet.data.load``.
        data: SHA-256 of its training split.
        rows: how many training rows at most, evenly spaced; None for all.
        recipe: how to train; its seed is the network's.
        seed: of the initial weights and the order of the data.
        scheme: how the rows are split, or None.
        parts: among how many networks.
        scheme_options: of the scheme: alpha, share, shards.
        threads: of the processor; their number decides the last bits.
        device: where it is trained.
    """

    model: str
    dataset: str
    data: str
    recipe: Recipe
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    rows: int | None = None
    scheme: Scheme | None = None
    parts: int = 1
    scheme_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    threads: int = 1
    device: str = "cpu"

    @property
    def facts(self) -> dict[str, Any]:
        """The spec as JSON values."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def key(self) -> str:
        """The hash of it, by which the network is cached."""
        return hashed(format=_FORMAT, **self.facts)

    @property
    def split(self) -> int:
        """The number of the split."""
        return self.seed // self.parts

    def build(self) -> nn.Module:
        """Return the network as it is before training."""
        return initialise(lambda: models.build(self.model, **self.options), self.seed)

    def training_rows(self, folder: Path | None = None) -> Split:
        """Return the images that it is trained on.

        Args:
            folder: where the split's index file is kept; nowhere if None.
        """
        images = load_split(self.dataset, "train", self.rows)
        if self.scheme is None:
            return images
        parts = data.partition(images.labels, self.parts, self.scheme, seed=self.split, **self.scheme_options)
        if folder is not None:
            about = {"dataset": self.dataset, "data": self.data, "rows": self.rows, "scheme": self.scheme}
            name = "-".join(map(str, (self.dataset, self.scheme, self.parts, f"split{self.split}")))
            save_partition(folder, _file_name(name), parts, {**about, "seed": self.split, **self.scheme_options})
        return images.rows(parts[self.seed % self.parts])


@final
@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network and how it got there; ``history`` has loss, accuracy and validation by epoch."""

    model: nn.Module
    scores: Mapping[str, float]
    history: tuple[Mapping[str, Any], ...]
    seconds: float
    rows: int
    where: Mapping[str, Any]


def obtain(
    spec: NetworkSpec,
    cache: Path,
    *,
    say: Callable[[str], None] = lambda text: None,
    tick: Callable[[float], None] = lambda share: None,
) -> Trained:
    """Take a network from the cache, or train it and put it there.

    A file that is broken, or no longer what the spec says, is not used: the network is trained again, and that is said.
    While one process trains a network, others that want it wait. The state is kept after every epoch.

    Args:
        spec: what makes it.
        cache: the folder; ``<key>.safetensors``, and ``<key>.json`` with what made it.
        say: told what is unexpected.
        tick: told how much of the training is done, 0..1.

    Raises:
        TrainingError, DataError, CheckpointError: it cannot be trained or written.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with _alone(cache / f"{spec.key}.lock"):
        weights, about = cache / f"{spec.key}.safetensors", cache / f"{spec.key}.json"
        if weights.exists() and about.exists():
            try:
                return _load(spec, weights, about)
            except (CheckpointError, ValueError, KeyError, TypeError, OSError) as error:
                say(f"{weights}: the cached network cannot be used ({' '.join(str(error).split())}); training it again")
        return _train(spec, weights, about, say, tick)


def keep(spec: NetworkSpec, cache: Path, trained: Trained) -> None:
    """Put a trained network into the cache."""
    weights, about = cache / f"{spec.key}.safetensors", cache / f"{spec.key}.json"
    state = trained.model.state_dict()
    save(state, weights, metadata=provenance([], spec.facts, spec.seed))
    document = {
        "key": spec.key,
        "spec": spec.facts,
        "tensors_sha256": tensors_sha256(state),
        "scores": dict(trained.scores),
        "history": [dict(epoch) for epoch in trained.history],
        "seconds": trained.seconds,
        "rows": trained.rows,
        "where": dict(trained.where),
    }
    with atomic_path(about) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _load(spec: NetworkSpec, weights: Path, about: Path) -> Trained:
    document = json.loads(about.read_text(encoding="utf-8"))
    found = hashed(format=_FORMAT, **document["spec"])
    if found != spec.key or document["key"] != spec.key:
        raise CheckpointError(f"{about.name} describes the network {found}, not {spec.key}")
    state = load(weights)
    if tensors_sha256(state) != document["tensors_sha256"]:
        raise CheckpointError("its tensors are not those that were written")
    model = spec.build()
    load_into(model, state, weights.name)
    return Trained(
        model.eval(),
        document["scores"],
        tuple(document["history"]),
        document["seconds"],
        document["rows"],
        document["where"],
    )


def _train(
    spec: NetworkSpec, weights: Path, about: Path, say: Callable[[str], None], tick: Callable[[float], None]
) -> Trained:
    images, state = spec.training_rows(), weights.with_suffix(".state")
    recipe = replace(spec.recipe, seed=spec.seed)

    def go() -> Any:
        with _epochs(tick):
            return train(
                spec.build(),
                images,
                recipe,
                device=spec.device,
                state_path=state,
                resume=True,
                progress=False,
            )

    started = state.exists()
    try:
        result = go()
    except TrainingError as error:
        if not started or isinstance(error.__cause__, OSError):
            raise
        say(f"{state}: the saved state cannot be used ({error}); training from the start")
        state.unlink(missing_ok=True)
        result = go()
    metrics = evaluate(result.model, load_split(spec.dataset, "test"), device=spec.device)
    history = tuple({"epoch": epoch.epoch, "loss": epoch.loss, "accuracy": epoch.accuracy} for epoch in result.history)
    trained = Trained(result.model.eval(), metrics.scores, history, result.seconds, len(images), here())
    keep(spec, weights.parent, trained)
    state.unlink(missing_ok=True)
    return trained


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however it ends; its file stays, or two could hold it at once."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class _Epochs(logging.Handler):
    """Passes on how much of a training is done."""

    def __init__(self, tick: Callable[[float], None]) -> None:
        super().__init__(logging.INFO)
        self.tick, self.thread = tick, threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.thread and isinstance(record.args, tuple) and len(record.args) == 3:
            number, epochs, _ = record.args
            self.tick(number / epochs)  # pyright: ignore[reportOperatorIssue, reportArgumentType]


@contextmanager
def _epochs(tick: Callable[[float], None]) -> Iterator[None]:
    log, handler = logging.getLogger("weldnet.training._run"), _Epochs(tick)
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in text)
