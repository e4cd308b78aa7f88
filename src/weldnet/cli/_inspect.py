"""``weldnet inspect``: what can be renumbered in a model."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weldnet.cli._common import (
    Checkpoint,
    FolderInput,
    FolderModel,
    Json,
    Outputs,
    Route,
    Seed,
    Written,
    emit,
    parse_outputs,
    stray_prints_to_stderr,
)
from weldnet.errors import UsageError

if TYPE_CHECKING:
    from weldnet.structure import Structure

__all__ = ["inspect"]

_DOT_SUFFIXES, _SVG_SUFFIXES = (".dot", ".gv"), (".svg",)
_STDOUT = Path("-")
#: Lines are never cut: who reads them wraps them.
WIDEST = 100_000


def inspect(
    checkpoint: Checkpoint = None,
    model: FolderModel = None,
    example_input: FolderInput = None,
    outputs: Outputs = None,
    route: Route = "auto",
    full: Annotated[bool, typer.Option("--full", help="Show every space and place, however many.")] = False,
    dot: Annotated[
        Path | None,
        typer.Option("--dot", metavar="FILE|-", help="Draw it for Graphviz (.dot, .gv).", show_default=False),
    ] = None,
    svg: Annotated[
        Path | None,
        typer.Option("--svg", metavar="FILE|-", help="Draw it as a picture for a browser (.svg).", show_default=False),
    ] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Show the structure of a model: spaces, places, what is frozen and why.

    With a checkpoint, its weights are put into the model first, so that one sees whether they fit.
    Checkpoints may be .safetensors, .pt, .pth, .bin, .ckpt, an .index.json, or a folder with one of them.
    """
    from weldnet.cli._early import check_route, require_files, require_model
    from weldnet.cli._specs import check_specs

    check_route(route)
    read = [checkpoint] if checkpoint is not None else []
    require_files(read)
    require_model(model, example_input, read, "inspect")
    check_specs(model, example_input)
    _check_drawings(dot, svg, json, read)
    written = Written.soon(*(path for path in (dot, svg) if path != _STDOUT))
    from weldnet.cli._input import make_input
    from weldnet.cli._model import build_model
    from weldnet.cli._networks import gather_networks
    from weldnet.structure import capture, layer_order

    if checkpoint is not None:
        network = next(iter(gather_networks(model, read).values()))
    else:
        assert model is not None
        network = build_model(model)
    x = make_input(example_input, network, seed=seed)
    with stray_prints_to_stderr():
        structure = capture(network, x, parse_outputs(outputs), route=route)
        order = layer_order(network, x) if dot or svg else []
    title = f"{model or checkpoint}, input {example_input or 'of its own'}"
    _write_drawings(structure, order, title, dot, svg)
    if json:
        emit(structure.to_json())
    elif _STDOUT not in (dot, svg):
        _show(structure, full)
    written.say()


def _check_drawings(dot: Path | None, svg: Path | None, json: bool, read: list[Path]) -> None:
    """Refuse what cannot be meant, before torch is imported."""
    from weldnet.cli._early import refuse_overwriting, refuse_suffix

    printed = [
        word for word, asked in (("--dot -", dot == _STDOUT), ("--svg -", svg == _STDOUT), ("--json", json)) if asked
    ]
    if len(printed) > 1:
        raise UsageError(f"{' and '.join(printed)} all write to stdout; give a file to all but one")
    files = [path for path in (dot, svg) if path is not None and path != _STDOUT]
    for path, suffixes in ((dot, _DOT_SUFFIXES), (svg, _SVG_SUFFIXES)):
        if path in files:
            refuse_suffix(path, suffixes)
    refuse_overwriting(files, read)
    if files:
        from weldnet.checkpoints import check_writable

        for path in files:
            check_writable(path)


def _write_drawings(structure: Structure, order: list[str], title: str, dot: Path | None, svg: Path | None) -> None:
    """Write both drawings, or on any failure none."""
    from weldnet.checkpoints import atomic_path
    from weldnet.structure import draw_dot, draw_svg

    with ExitStack() as stack:
        for path, draw in ((dot, draw_dot), (svg, draw_svg)):
            if path == _STDOUT:
                emit(draw(structure, order, title=title))
            elif path is not None:
                text = draw(structure, order, title=title)
                stack.enter_context(atomic_path(path)).write_text(text, encoding="utf-8")


def _show(structure: Structure, full: bool) -> None:
    """Print the tree: with colours on a terminal and plain elsewhere, however wide; a terminal wraps long lines."""
    from rich.console import Console

    from weldnet.structure import tree

    Console(width=WIDEST).print(tree(structure, full=full), soft_wrap=True, highlight=False)
