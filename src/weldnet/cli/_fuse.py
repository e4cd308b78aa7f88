"""``weldnet fuse``: two or more checkpoints in, one out."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weldnet.cli._common import (
    INPUT_HELP,
    MODEL_HELP,
    Json,
    Options,
    emit,
    interactive,
    parse_options,
    print_json,
    say,
    stray_prints_to_stderr,
)

if TYPE_CHECKING:
    from weldnet.cli._config import FuseConfig
    from weldnet.fusion import Fusion

__all__ = ["fuse", "refuse_overwriting", "write_results"]


def fuse(
    networks: Annotated[
        list[Path] | None, typer.Argument(metavar="A B [C ...]", help="Trained networks.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT", help="Where the fused network goes.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="SPEC", help=MODEL_HELP)] = None,
    example_input: Annotated[str | None, typer.Option("--input", metavar="SPEC", help=INPUT_HELP)] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="gamf, weight_matching or identity. [default: gamf]")
    ] = None,
    option: Options = None,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar=".5,.5", help="Shares in the average. [default: equal]")
    ] = None,
    repair: Annotated[str | None, typer.Option("--repair", help="auto, none or data. [default: auto]")] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DIR|NAME", help="Optional: train images for the repair, test split to score."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Unlabelled images for the repair. [default: 512]")
    ] = None,
    size: Annotated[float | None, typer.Option("--size", help="Of the result, in parents. [default: 1.0]")] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write the table: .html, .json or .md.")
    ] = None,
    alignment_out: Annotated[
        Path | None, typer.Option("--alignment-out", metavar="FILE", help="Write who went where (.safetensors).")
    ] = None,
    check: Annotated[
        bool | None,
        typer.Option("--check/--no-check", help="Prove that renumbering keeps every parent. [default: check]"),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of everything random. [default: 0]")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Where to align: cpu, cuda, ...")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="YAML with these options as keys; options win.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved settings as YAML and stop.")
    ] = False,
    json: Json = False,
) -> None:
    """Fuse two or more trained networks of one architecture into one.

    Training data is not needed. Every parent is proved unchanged by its alignment before anything is averaged.
    """
    from weldnet.cli._config import resolve

    given = {
        "networks": networks,
        "output": output,
        "model": model,
        "input": example_input,
        "method": method,
        "options": parse_options(option),
        "weights": weights,
        "repair": repair,
        "data": data,
        "samples": samples,
        "size": size,
        "report": report,
        "alignment_out": alignment_out,
        "check": check,
        "seed": seed,
        "device": device,
    }
    settings = resolve(config, given)
    if print_config:
        emit(settings.to_yaml().rstrip())
        return
    result = _fuse(settings)
    if json:
        print_json({**result.report.to_dict(), "output": settings.output, "networks": settings.networks})
    else:
        emit(str(result.report))
    for path in (settings.output, settings.report, settings.alignment_out):
        if path is not None:
            say(f"wrote {path}")


def _fuse(settings: FuseConfig) -> Fusion:
    _check_settings(settings)
    _check_outputs(settings)
    from weldnet.cli._input import make_input
    from weldnet.cli._model import build_model
    from weldnet.cli._networks import load_networks
    from weldnet.fusion import fuse

    assert settings.model is not None
    assert settings.input is not None
    networks = load_networks(build_model(settings.model), settings.networks)
    first = next(iter(networks.values()))
    example_input = make_input(settings.input, first, seed=settings.seed)
    unlabelled, labelled = _load_data(settings)
    with stray_prints_to_stderr():
        result = fuse(
            networks,
            example_input,
            method=settings.method,
            weights=settings.weights,
            repair=settings.repair,
            data=unlabelled,
            evaluate_on=labelled,
            size=settings.size,
            check=settings.check,
            seed=settings.seed,
            device=settings.device,
            progress=interactive(),
            **settings.options,
        )
    assert settings.output is not None
    write_results(result, settings.output, settings.networks, settings.report, settings.alignment_out)
    return result


def write_results(
    result: Fusion, output: Path, files: list[Path], report: Path | None = None, alignment: Path | None = None
) -> None:
    """Write the fused network and what goes with it: all of it, or on any failure nothing.

    Raises:
        CheckpointError: one of the files cannot be written.
    """
    from weldnet.checkpoints import atomic_path
    from weldnet.cli._report import render

    with ExitStack() as stack:
        if report is not None:
            text = render(result.report, report.suffix)
            stack.enter_context(atomic_path(report)).write_text(text, encoding="utf-8")
        if alignment is not None:
            _save_alignment(result, stack.enter_context(atomic_path(alignment)), alignment)
        result.save(output, files=files)


def _save_alignment(result: Fusion, temporary: Path, path: Path) -> None:
    from weldnet.errors import CheckpointError

    try:
        result.alignment.save(temporary)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(temporary), str(path))) from error


def _check_settings(settings: FuseConfig) -> None:
    """Refuse what cannot be meant, before anything is read."""
    from weldnet.errors import UsageError

    if len(settings.networks) < 2:
        found = f"only {str(settings.networks[0])!r}" if settings.networks else "no files"
        raise UsageError(f"fusing needs two networks or more and got {found}; see weldnet fuse --help")
    needed = {"output": "-o OUT", "model": "--model SPEC", "input": "--input SPEC"}
    missing = [word for key, word in needed.items() if getattr(settings, key) is None]
    if missing:
        raise UsageError(f"fusing needs {' and '.join(missing)}; see weldnet fuse --help")
    from weldnet.cli._method import check_device, choose_method
    from weldnet.fusion import REPAIRS, normalise_weights

    choose_method(settings.method, settings.options)
    check_device(settings.device)
    if settings.repair not in REPAIRS:
        raise UsageError(f"unknown repair {settings.repair!r}; weldnet has {', '.join(REPAIRS)}")
    if settings.repair == "data" and settings.data is None:
        raise UsageError("--repair data needs unlabelled images; give --data, or --repair none")
    if not isinstance(settings.weights, dict):
        normalise_weights(settings.weights, len(settings.networks))


def _check_outputs(settings: FuseConfig) -> None:
    from weldnet.checkpoints import SUFFIXES, check_writable
    from weldnet.cli._report import REPORT_SUFFIXES

    assert settings.output is not None
    refuse_suffix(settings.output, SUFFIXES)
    if settings.report is not None:
        refuse_suffix(settings.report, REPORT_SUFFIXES)
    if settings.alignment_out is not None:
        refuse_suffix(settings.alignment_out, (".safetensors",))
    outputs = [path for path in (settings.output, settings.report, settings.alignment_out) if path is not None]
    refuse_overwriting(outputs, settings.networks)
    for path in outputs:
        check_writable(path)


def refuse_suffix(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raise UsageError for an output file whose suffix is not among the given ones."""
    from weldnet.errors import UsageError

    if path.suffix not in suffixes:
        raise UsageError(f"{str(path)!r}: cannot write the extension {path.suffix!r}; use {', '.join(suffixes)}")


def refuse_overwriting(outputs: list[Path], inputs: list[Path]) -> None:
    """Raise UsageError if an output is an input, lies among an input's shards, or is another output."""
    from weldnet.errors import UsageError

    taken = {os.path.realpath(path): path for path in inputs}
    homes = [path if path.is_dir() else path.parent for path in inputs if path.is_dir() or path.suffix == ".json"]
    for path in outputs:
        where = os.path.realpath(path)
        inside = path.exists() and any(path.resolve().parent == home.resolve() for home in homes)
        if where in taken or inside:
            raise UsageError(f"{str(path)!r} is read or written twice; choose another output path")
        taken[where] = path


def _load_data(settings: FuseConfig) -> tuple[Any, Any]:
    """Unlabelled training images for the repair, and the test split for the scores."""
    if settings.data is None:
        return None, None
    from weldnet.data import load

    labelled = load(settings.data, split="test")
    if settings.repair == "none":
        return None, labelled
    return load(settings.data, split="train", limit=settings.samples).images, labelled
