"""What several commands share: the options they have in common, and how they speak."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from weldnet.cli._outputs import WEIGHTS

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "Data",
    "Device",
    "FolderInput",
    "FolderModel",
    "FolderModels",
    "InputSpec",
    "Json",
    "Method",
    "ModelSpec",
    "Options",
    "Outputs",
    "Route",
    "RouteIfAny",
    "Seed",
    "Split",
    "Written",
    "as_json",
    "emit",
    "interactive",
    "parse_options",
    "parse_outputs",
    "parse_scalar",
    "print_json",
    "say",
    "show",
    "stray_prints_to_stderr",
]

MODEL_HELP = (
    "Who builds the network: pkg.mod:factory, path/to/file.py:factory, a folder with a config.json, or a name such as "
    "vgg11?width=0.25."
)
INPUT_HELP = (
    "What the network takes: 1,3,32,32, or 1,16:int64, or '1,16:int64<100' (random below 100); several with ';' "
    "between; by name as in ids=1,16:int64; or a file with tensors."
)

NETWORKS_HELP = "Trained weights: .safetensors, .pt, .pth, .bin, .ckpt, an .index.json or a folder."

Checkpoint = Annotated[Path | None, typer.Argument(metavar="[CHECKPOINT]", help=NETWORKS_HELP, show_default=False)]
Checkpoints = Annotated[list[Path], typer.Argument(metavar="A [B ...]", help=NETWORKS_HELP, show_default=False)]
ModelSpec = Annotated[str, typer.Option("--model", metavar="SPEC", help=MODEL_HELP)]
InputSpec = Annotated[str, typer.Option("--input", metavar="SPEC", help=INPUT_HELP)]
FOLDERS_DO_WITHOUT = "(required, except for folders with a config.json)"
FolderModel = Annotated[
    str | None,
    typer.Option("--model", metavar="SPEC", help=f"{MODEL_HELP} {FOLDERS_DO_WITHOUT}", show_default=False),
]
FolderModels = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="SPEC",
        help=f"{MODEL_HELP} May be given once for each network, in their order, where widths differ. "
        f"{FOLDERS_DO_WITHOUT}",
        show_default=False,
    ),
]
FolderInput = Annotated[
    str | None,
    typer.Option("--input", metavar="SPEC", help=f"{INPUT_HELP} {FOLDERS_DO_WITHOUT}", show_default=False),
]
DATA_METAVAR = "SPEC"
DATA_NOTE = (
    "Names and folders are normalised by weldnet (how is said on stderr). For other preprocessing give "
    "path/to/file.py:factory, called with split='train' or 'test', which returns (inputs, labels) tensors, a Dataset "
    "or a DataLoader; or use the Python API: data=, evaluate_on=."
)
Data = Annotated[
    str,
    typer.Option(
        "--data", metavar=DATA_METAVAR, help=f"Labelled images: digits, mnist, cifar10, a folder, ... {DATA_NOTE}"
    ),
]
Split = Annotated[str, typer.Option("--split", help="train or test.")]
Method = Annotated[
    str, typer.Option("--method", help="How to align: gamf, weight_matching, ... or auto (docs/methods.md).")
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="An option of the method, such as sigma=4.", show_default=False),
]
OUTPUTS_HELP = "What counts as output, in what the network returns: logits, or 0,1.hidden. (default: what it answers)"
Outputs = Annotated[str | None, typer.Option("--outputs", metavar="NAME,...", help=OUTPUTS_HELP, show_default=False)]
ROUTE_HELP = "How the operations are found: dispatch (one forward pass), export (torch.export), or auto."
Route = Annotated[str, typer.Option("--route", help=ROUTE_HELP)]
RouteIfAny = Annotated[str | None, typer.Option("--route", help=f"{ROUTE_HELP} (default: auto)", show_default=False)]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of everything random.")]
Device = Annotated[str | None, typer.Option("--device", help="Where to compute: cpu, cuda, ...", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


@dataclass(frozen=True)
class Written:
    """The files that a command is going to write, and those of them that are there already.

    Args:
        paths: as the user named them.
        there: what writing replaces.
    """

    paths: tuple[Path, ...]
    there: frozenset[Path]

    @staticmethod
    def soon(*paths: Path | None) -> Written:
        """Look for the files before they are written; those that are None are not."""
        given = tuple(path for path in paths if path is not None)
        return Written(given, frozenset(path for path in given if os.path.lexists(_replaced(path))))

    def say(self) -> None:
        """Tell the person what was written, and what that replaced."""
        for path in self.paths:
            say(f"wrote {path}" + (", in place of what was there" if path in self.there else ""))


def _replaced(path: Path) -> Path:
    """Return what writing replaces: of a folder the weights, for what else lies in it stays."""
    return path / WEIGHTS if path.is_dir() else path


def say(message: str, *, kind: str = "") -> None:
    """Tell the person something on stderr, on one line."""
    prefix = f"weldnet: {kind}: " if kind else "weldnet: "
    with contextlib.suppress(OSError, ValueError):
        print(prefix + " ".join(message.split()), file=sys.stderr, flush=True)


def emit(text: str) -> None:
    """Print data on stdout, without the blanks that pad tables."""
    print("\n".join(line.rstrip() for line in text.splitlines()), flush=True)


def show(*renderables: Any) -> None:
    """Print tables on stdout, 110 columns wide where that is no terminal."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 110)
    for renderable in renderables:
        console.print(renderable, highlight=False, markup=False)


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document on stdout; numbers that JSON cannot write become null."""
    emit(as_json(document))


def as_json(document: Mapping[str, Any]) -> str:
    """Write a JSON document; numbers that JSON cannot write become null."""
    return json.dumps(_plain(document), indent=1)


def interactive() -> bool:
    """Say whether progress may be shown: stderr is a terminal."""
    return sys.stderr.isatty()


@contextlib.contextmanager
def stray_prints_to_stderr() -> Iterator[None]:
    """Keep what the user's own code prints out of the data on stdout."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def parse_options(pairs: Sequence[str] | None) -> dict[str, Any]:
    """Read ``key=value`` pairs.

    Raises:
        UsageError: a pair without a key or an ``=``.

    >>> parse_options(["sigma=4", "affinity=vector"])
    {'sigma': 4, 'affinity': 'vector'}
    """
    from weldnet.errors import UsageError

    options: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--option {pair!r} is not KEY=VALUE; write it as in --option sigma=4")
        options[key.strip()] = parse_scalar(value.strip())
    return options


def parse_outputs(text: str | None) -> list[str] | None:
    """Read the names of outputs, with commas between.

    >>> parse_outputs("logits, aux"), parse_outputs(None)
    (['logits', 'aux'], None)
    """
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def parse_scalar(text: str) -> Any:
    """Read a value as Python would: a number, true, false, none, numbers with commas between, else text.

    >>> [parse_scalar(text) for text in ("4", "1e-3", "inf", "false", "64,32", "edge")]
    [4, 0.001, inf, False, (64, 32), 'edge']
    """
    if "," in text:
        return tuple(parse_scalar(part.strip()) for part in text.strip("()[]").split(",") if part.strip())
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
