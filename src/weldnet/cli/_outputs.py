"""What ``fuse`` leaves behind: weights or a folder with its card, a report, the alignment."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from torch import nn

    from weldnet.cli._config import FuseConfig
    from weldnet.evaluation import Labelled
    from weldnet.fusion import Fusion
    from weldnet.streaming import Streamed

__all__ = [
    "CARD",
    "CONFIG",
    "WEIGHTS",
    "Outputs",
    "is_folder",
    "refuse_foreign",
    "this_command",
    "write_beside",
    "write_results",
]

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.yaml", "README.md"
"""What a folder of a fused network holds."""

#: What tells of a network in shards or of the transformers library: beside it new weights would be read wrongly or not.
_OTHER_KINDS = ("model.safetensors.index.json", "weldnet.json", "config.json")


@final
@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where the results of a fusion go, and what is said about them.

    Args:
        weights: a file, or a folder for weights, config and card.
        files: the parents' checkpoints.
        report: ``.html``, ``.md``, ``.csv`` or ``.json``.
        alignment: ``.safetensors``.
        config: the settings as YAML, for a folder.
        model: what builds the network, for the card.
        parents: the networks by name, for the report's barrier.
        evaluate_on: labelled data, for the same.
        device: where to compute it.
    """

    weights: Path
    files: Sequence[Path]
    report: Path | None = None
    alignment: Path | None = None
    config: str = ""
    model: str = ""
    parents: Mapping[str, nn.Module] = field(default_factory=dict[str, "nn.Module"])
    evaluate_on: Labelled | None = None
    device: str | None = None

    @staticmethod
    def of(settings: FuseConfig) -> Outputs:
        """Return what the settings of a command say about its outputs; they name where the weights go."""
        assert settings.output is not None
        return Outputs(
            weights=settings.output,
            files=settings.networks,
            report=settings.report,
            alignment=settings.alignment_out,
            config=settings.to_yaml(),
            model=", ".join(settings.models),
            device=settings.device,
        )

    @property
    def paths(self) -> list[Path]:
        """Everything that is written, as the user named it."""
        return [path for path in (self.weights, self.report, self.alignment) if path is not None]


def is_folder(output: Path) -> bool:
    """Say whether an output is to be a folder: its name has no extension, or it is one without that of a checkpoint."""
    from weldnet.cli._early import WRITTEN_SUFFIXES

    return not output.suffix or (output.is_dir() and output.suffix not in WRITTEN_SUFFIXES)


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder that holds files of other origin where ours would go, or a network that ours would not replace.

    Raises:
        UsageError: naming the file.
    """
    from weldnet.errors import UsageError

    card = folder / CARD
    try:
        ours = _mark() in card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        ours = False
    for name in (WEIGHTS, CONFIG, CARD):
        if not ours and (folder / name).exists():
            raise UsageError(
                f"{str(folder / name)!r} is there already and not of weldnet's making; choose another folder"
            )
    for name in _OTHER_KINDS:
        if os.path.lexists(folder / name):
            raise UsageError(
                f"{str(folder / name)!r} belongs to a network in shards or of transformers, which is not replaced; "
                "choose another folder"
            )


def _mark() -> str:
    from weldnet.report import CARD_MARK

    return CARD_MARK


def write_results(result: Fusion, outputs: Outputs) -> None:
    """Write the fused network and what goes with it: all of it, or on any failure nothing.

    Raises:
        CheckpointError: one of the files cannot be written.
    """
    with ExitStack() as stack:
        _enter_companions(stack, result, outputs)
        if is_folder(outputs.weights):
            _write_folder(result, outputs, stack)
        else:
            result.save(outputs.weights, files=outputs.files)


def write_beside(result: Streamed, outputs: Outputs) -> None:
    """Write what goes with shards that are written already: config, card, report, alignment.

    Raises:
        CheckpointError: one of the files cannot be written.
    """
    from weldnet.checkpoints import atomic_path
    from weldnet.report import card

    loads = f'import weldnet\n\nstate = weldnet.load("{outputs.weights.name}")'
    names = [str(file) for file in outputs.files]
    text = card(result, config=outputs.config, files=names, model=outputs.model, loads=loads)
    with ExitStack() as stack:
        _enter_companions(stack, result, outputs)
        for name, content in ((CONFIG, outputs.config), (CARD, text)):
            stack.enter_context(atomic_path(outputs.weights / name)).write_text(content, encoding="utf-8")


def _enter_companions(stack: ExitStack, result: Fusion | Streamed, outputs: Outputs) -> None:
    """Write the report and the alignment; they get their names when the stack closes."""
    from weldnet.checkpoints import atomic_path

    if outputs.report is not None:
        text = _report(result, outputs)
        stack.enter_context(atomic_path(outputs.report)).write_text(text, encoding="utf-8")
    if outputs.alignment is not None:
        _save_alignment(result, stack.enter_context(atomic_path(outputs.alignment)), outputs.alignment)


def _write_folder(result: Fusion, outputs: Outputs, stack: ExitStack) -> None:
    from weldnet.checkpoints import atomic_path
    from weldnet.cli._early import is_pretrained
    from weldnet.cli._pretrained import save_pretrained
    from weldnet.report import card

    names = [str(file) for file in outputs.files]
    if all(map(is_pretrained, outputs.files)):
        loads = f'import transformers\n\nmodel = transformers.{type(result.model).__name__}.from_pretrained("FOLDER")'
        text = card(result, config=outputs.config, files=names, loads=loads)
        more = {CARD: text, CONFIG: outputs.config}
        save_pretrained(result.model, outputs.weights, outputs.files[0], result.provenance(outputs.files), more)
        return
    text = card(result, config=outputs.config, files=names, model=outputs.model, weights=WEIGHTS)
    with _new_or_old(outputs.weights) as folder:
        for name, content in ((CONFIG, outputs.config), (CARD, text)):
            stack.enter_context(atomic_path(folder / name)).write_text(content, encoding="utf-8")
        result.save(folder / WEIGHTS, files=outputs.files)
        stack.close()


@contextlib.contextmanager
def _new_or_old(target: Path) -> Iterator[Path]:
    """Yield the folder that is there, or a new one that takes its name at the end."""
    if target.is_dir():
        yield target
        return
    temporary = target.resolve().parent / f".weldnet-{secrets.token_hex(8)}.tmp"
    try:
        yield temporary
        temporary.rename(target.resolve())
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _report(result: Fusion | Streamed, outputs: Outputs) -> str:
    from weldnet.records import Records
    from weldnet.report import build, fusion_records, to_csv, to_html, to_markdown

    assert outputs.report is not None
    if outputs.report.suffix == ".json":
        return json.dumps(result.report.to_dict(), indent=1) + "\n"
    records = fusion_records(
        result,
        parents=outputs.parents or None,
        evaluate_on=outputs.evaluate_on,
        command=this_command(),
        device=outputs.device,
    )
    write = {".html": to_html, ".md": to_markdown, ".csv": to_csv}[outputs.report.suffix]
    return write(build(Records(tuple(records))))


def this_command() -> str:
    """Return the command line of this process, as one would type it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _save_alignment(result: Fusion | Streamed, temporary: Path, path: Path) -> None:
    from weldnet.errors import CheckpointError

    try:
        result.alignment.save(temporary)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(temporary), str(path))) from error
