"""Folders of the transformers library: ``config.json`` and weights. Nothing is downloaded, none of their code runs."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weldnet.cli._common import say, stray_prints_to_stderr
from weldnet.cli._early import is_pretrained
from weldnet.errors import CheckpointError, ModelError, UsageError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["build_pretrained", "companions", "dummy_input", "load_pretrained", "require_alike", "save_pretrained"]

#: What says nothing about whether two networks fit together.
_UNIMPORTANT = (
    "_",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "initializer",
    "output_",
    "return_dict",
)
_UNIMPORTANT_PARTS = ("dropout", "pdrop", "drop_", "id2label", "label2id", "problem_type", "task_specific", "_token_id")
#: What is not copied beside the fused weights: other weights, the state of a training run, code, pages on one parent.
_NOT_COPIED = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json"),
    *(".py", ".md", ".log", "trainer_state.json"),
)
_INSTALL = "pip install transformers"


def build_pretrained(folder: Path) -> nn.Module:
    """Build the network that a folder's ``config.json`` describes, with new weights.

    Raises:
        ModelError: transformers is missing, does not know the network, or cannot build it.
    """
    config, factory = _config_and_class(folder)
    with _quiet(), _reported(folder, "cannot be built"):
        return factory(config)


def load_pretrained(folder: Path, name: str) -> nn.Module:
    """Load a network from a folder with ``config.json`` and weights, as transformers does, in the file's precision.

    Raises:
        ModelError: as `build_pretrained`.
        CheckpointError: the weights cannot be read, do not fit the config, or hold NaN or Inf.
    """
    from weldnet.checkpoints import read_metadata, validate_finite

    _, factory = _config_and_class(folder)
    read_metadata(folder)  # says what is wrong with the files better than transformers does
    with _quiet(), _reported(folder, "cannot be loaded", CheckpointError):
        network, info = factory.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype="auto", weights_only=True
        )
    for key, words in (
        ("missing_keys", "lacks"),
        ("unexpected_keys", "has unknown"),
        ("mismatched_keys", "misfits in"),
    ):
        if info.get(key):
            first = sorted(map(str, info[key]))
            raise CheckpointError(
                f"{str(folder)!r}: {words} {len(first)} of the tensors of {factory.__name__} ({', '.join(first[:3])}); "
                "give the folder of a complete network of the class that config.json names"
            )
    validate_finite(network.state_dict(), name)
    return network.eval()


def require_alike(folders: Sequence[Path]) -> None:
    """Require that networks have the same architecture and widths.

    Raises:
        CheckpointError: naming the first key of the configs that differs, and both values.
        ModelError: a config cannot be read.
    """
    first = _settings(folders[0])
    for folder in folders[1:]:
        other = _settings(folder)
        for key in dict.fromkeys((*first, *other)):
            if first.get(key) != other.get(key):
                raise CheckpointError(
                    f"{str(folders[0])!r} and {str(folder)!r} are different networks: {key} is "
                    f"{_short(first.get(key))} and {_short(other.get(key))}; give networks of one architecture"
                )


def dummy_input(network: nn.Module) -> dict[str, Any] | None:
    """Return an input that the network brings along, and say so; None for a network that has none of its own."""
    import torch

    name, config = getattr(network, "main_input_name", None), getattr(network, "config", None)
    if name is None or config is None:
        return None
    if name == "pixel_values":
        side, channels = getattr(config, "image_size", 224), getattr(config, "num_channels", 3)
        sides = tuple(side) if isinstance(side, list | tuple) else (side, side)
        found: Any = {name: torch.randn(1, channels, *sides, generator=torch.Generator().manual_seed(0))}
    else:
        found = getattr(network, "dummy_inputs", None)
    if not isinstance(found, Mapping) or name not in found:
        return None
    tensors = {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}
    shown = ", ".join(f"{key} {'x'.join(map(str, value.shape))}" for key, value in tensors.items())
    say(f"no --input is given; the network's own example is used ({shown})", kind="note")
    return dict(found)


def save_pretrained(
    network: nn.Module,
    output: Path,
    parent: Path,
    metadata: Mapping[str, str],
    more: Mapping[str, str] | None = None,
) -> None:
    """Write a folder that transformers loads: config, weights, the parent's tokenizer files, and where it comes from.

    Args:
        network: what to write.
        output: the new folder; appears whole or not at all.
        parent: a folder of the same kind, whose other files are copied.
        metadata: the provenance, written as ``weldnet.json``.
        more: other text files by name.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    temporary = output.resolve().parent / f".weldnet-{secrets.token_hex(8)}.tmp"
    try:
        temporary.mkdir(parents=True)
        with _quiet():
            network.save_pretrained(temporary)  # pyright: ignore[reportCallIssue]  (built by transformers)
        for file in companions(parent):
            if not (temporary / file.name).exists():
                shutil.copyfile(file, temporary / file.name)
        document = {key: _parsed(value) for key, value in metadata.items()}
        for name, text in {"weldnet.json": json.dumps(document, indent=1) + "\n", **(more or {})}.items():
            (temporary / name).write_text(text, encoding="utf-8")
        temporary.rename(output.resolve())
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, Exception):
            raise CheckpointError(
                f"{str(output)!r}: cannot be written: {_one_line(error)}; choose another output folder or make room"
            ) from error
        raise


def companions(folder: Path) -> list[Path]:
    """Return the files of a folder that go with any weights of its network: the config, the tokenizer, ..."""
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(_NOT_COPIED)
    ]


# -- transformers ------------------------------------------------------------------------------------


def _config_and_class(folder: Path) -> tuple[Any, Any]:
    transformers = _transformers()
    if not is_pretrained(folder):
        raise UsageError(
            f"{str(folder)!r} has no config.json with 'architectures' or 'model_type'; give a folder that transformers "
            "wrote, or name a factory: path/to/file.py:factory"
        )
    with _quiet(), _reported(folder, "has a config.json that transformers cannot read"):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    names = getattr(config, "architectures", None) or []
    with _reported(folder, "cannot be built"):
        if not names:
            base = transformers.AutoModel._model_mapping[type(config)]
            return config, base[0] if isinstance(base, tuple) else base
        factory = getattr(transformers, names[0], None)
    if factory is None:
        raise ModelError(
            f"{str(folder)!r}: transformers {transformers.__version__} has no {names[0]}; code from the folder is "
            "never run: name a factory with --model path/to/file.py:factory"
        )
    return config, factory


def _transformers() -> Any:
    try:
        import transformers  # pyright: ignore[reportMissingImports]
    except Exception as error:  # what it imports may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == "transformers":
            raise ModelError(f"folders with a config.json need transformers; {_INSTALL}") from error
        raise ModelError(
            f"folders with a config.json need transformers, which is there but cannot be imported: {_root(error)}; "
            "make python -c 'import transformers' work first"
        ) from error
    return transformers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and warnings of transformers out of the way."""
    from transformers.utils import logging  # pyright: ignore[reportMissingImports]

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with stray_prints_to_stderr():
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _reported(folder: Path, what: str, kind: type[ModelError] | type[CheckpointError] = ModelError) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise kind(
            f"{str(folder)!r} {what}: {_root(error)}; check that transformers alone loads this folder"
        ) from error


def _settings(folder: Path) -> dict[str, Any]:
    config, factory = _config_and_class(folder)
    settings = {"architectures": factory.__name__, **config.to_dict()}
    settings["architectures"] = factory.__name__
    return {key: value for key, value in settings.items() if _matters(key)}


def _matters(key: str) -> bool:
    return not key.startswith(_UNIMPORTANT) and not any(part in key for part in _UNIMPORTANT_PARTS)


# -- text --------------------------------------------------------------------------------------------


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _root(error: BaseException) -> str:
    """Say what went wrong, and what was behind it: transformers imports its parts late, and then hides why not."""
    first, last, seen = error, error, {id(error)}
    while (behind := last.__cause__ or last.__context__) is not None and id(behind) not in seen:
        last = behind
        seen.add(id(behind))
    cause = f"{type(last).__name__}: {_one_line(last)}"
    return _one_line(first) if last is first or _one_line(last) in _one_line(first) else f"{_one_line(first)} ({cause})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _parsed(text: str) -> Any:
    """Metadata of weights are texts, some of which are JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text
