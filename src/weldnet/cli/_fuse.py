"""``weldnet fuse``: two or more checkpoints in, one out."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weldnet.cli._common import (
    DATA_METAVAR,
    DATA_NOTE,
    NETWORKS_HELP,
    FolderInput,
    FolderModels,
    Json,
    Options,
    Outputs,
    RouteIfAny,
    Written,
    emit,
    interactive,
    parse_options,
    parse_outputs,
    print_json,
    stray_prints_to_stderr,
)
from weldnet.cli._stream import check_streaming, fuse_streaming

if TYPE_CHECKING:
    from weldnet.cli._config import FuseConfig
    from weldnet.fusion import Fusion
    from weldnet.streaming import Streamed

__all__ = ["fuse"]


def fuse(
    networks: Annotated[
        list[Path] | None,
        typer.Argument(metavar="A B [C ...]", help=NETWORKS_HELP, show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help="The fused network: .safetensors, .pt, .pth or .bin; or a folder, for weights, config and a card. "
            "(required)",
        ),
    ] = None,
    model: FolderModels = None,
    example_input: FolderInput = None,
    outputs: Outputs = None,
    route: RouteIfAny = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="gamf, weight_matching, ... or auto (docs/methods.md). (default: gamf)"),
    ] = None,
    option: Options = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar=".5,.5", help="Shares in the average; must sum to 1. (default: equal)"),
    ] = None,
    repair: Annotated[
        str | None,
        typer.Option(
            "--repair",
            help="auto, none, weights, synthetic, data, refit, calibrate; several joined by +. (default: auto)",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar=DATA_METAVAR,
            help=f"Optional: train images for the repair, test split to score. {DATA_NOTE}",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Unlabelled images for the repair. (default: 512)")
    ] = None,
    size: Annotated[
        float | None,
        typer.Option("--size", help="In parents, 1 to their number: what matches badly is kept apart. (default: 1.0)"),
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(
            "--into",
            metavar="NAME",
            help="The network, by its file's name without extension, whose class, widths and order the result has; "
            "other widths need --method optimal_transport. (default: the first)",
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write a page: .html, .md, .csv or .json.")
    ] = None,
    alignment_out: Annotated[
        Path | None, typer.Option("--alignment-out", metavar="FILE", help="Write who went where (.safetensors).")
    ] = None,
    check: Annotated[
        bool | None,
        typer.Option("--check/--no-check", help="Prove that renumbering keeps every parent. (default: --check)"),
    ] = None,
    spaces: Annotated[bool, typer.Option("--spaces", help="Also print how well each space was matched.")] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="Of everything random. (default: 0)")] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="Where to compute: cpu, cuda, ... (default: cpu)")
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--in-memory",
            help="Read weights tensor by tensor and write a folder of shards, for networks larger than memory; goes on "
            "where it was interrupted. (default: --in-memory)",
        ),
    ] = None,
    shard_size: Annotated[
        str | None,
        typer.Option("--shard-size", metavar="SIZE", help="Of one file that --stream writes: 500MB. (default: 2GB)"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="FILE", help="YAML with these options as keys (required ones too); options win."
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved settings as YAML and stop.")
    ] = False,
    json: Json = False,
) -> None:
    """Fuse two or more trained networks of one architecture into one.

    Training data is not needed. Every parent is proved unchanged by its alignment before anything is averaged.
    Checkpoints may be .safetensors, .pt, .pth, .bin, .ckpt, an .index.json, or a folder with one of them.
    """
    from weldnet.cli._config import resolve

    given = {
        "networks": networks,
        "output": output,
        "model": model,
        "input": example_input,
        "outputs": parse_outputs(outputs),
        "route": route,
        "method": method,
        "options": parse_options(option),
        "weights": weights,
        "repair": repair,
        "data": data,
        "samples": samples,
        "size": size,
        "into": into,
        "report": report,
        "alignment_out": alignment_out,
        "check": check,
        "seed": seed,
        "device": device,
        "stream": stream,
        "shard_size": shard_size,
    }
    settings = resolve(config, given)
    if print_config:
        emit(settings.to_yaml().rstrip())
        return
    check_streaming(settings, spaces)
    written = Written.soon(settings.output, settings.report, settings.alignment_out)
    result = _fuse(settings)
    if json:
        print_json({**result.report.to_dict(), "output": settings.output, "networks": settings.networks})
    else:
        emit(str(result.report))
        if spaces:
            emit(f"\n{result.report.diagnosis}")
    written.say()


def _fuse(settings: FuseConfig) -> Fusion | Streamed:
    _check_settings(settings)
    _check_outputs(settings)
    if settings.stream:
        return fuse_streaming(settings)
    from weldnet.cli._input import make_input
    from weldnet.cli._method import check_device, choose_method
    from weldnet.cli._networks import gather_networks
    from weldnet.cli._outputs import Outputs, write_results
    from weldnet.errors import UsageError
    from weldnet.fusion import fuse

    if settings.method != "auto":  # which depends on the networks
        chosen = choose_method(settings.method, settings.options)
        if chosen.needs_data and settings.data is None:
            given = "".join(f" with --option {key}={value}" for key, value in settings.options.items())
            raise UsageError(
                f"--method {settings.method}{given} needs unlabelled inputs; give --data, or another method"
            )
        check_device(settings.device, chosen)
    else:
        check_device(settings.device)
    networks = gather_networks(settings.models, settings.networks)
    first = next(iter(networks.values()))
    example_input = make_input(settings.input, first, seed=settings.seed)
    unlabelled, labelled = _load_data(settings)
    with stray_prints_to_stderr():
        result = fuse(
            networks,
            example_input,
            outputs=settings.outputs,
            route=settings.route,
            method=settings.method,
            weights=settings.weights,
            repair=settings.repair,
            data=unlabelled,
            evaluate_on=labelled,
            size=settings.size,
            into=settings.into,
            check=settings.check,
            seed=settings.seed,
            device=settings.device,
            progress=interactive(),
            **settings.options,
        )
    with stray_prints_to_stderr():
        write_results(result, replace(Outputs.of(settings), parents=networks, evaluate_on=labelled))
    return result


def _check_settings(settings: FuseConfig) -> None:
    """Refuse what cannot be meant, before anything is read."""
    from weldnet._words import parse_size
    from weldnet.cli._early import (
        check_data,
        check_method,
        check_options,
        check_repair,
        check_route,
        check_size,
        check_weights,
        require_files,
        require_model,
    )
    from weldnet.cli._specs import check_specs
    from weldnet.errors import UsageError

    if settings.shard_size is not None:
        parse_size(settings.shard_size)
    if len(settings.networks) < 2:
        found = f"only {str(settings.networks[0])!r}" if settings.networks else "no files"
        raise UsageError(f"fusing needs two networks or more and got {found}; see weldnet fuse --help")
    if settings.output is None:
        raise UsageError("fusing needs -o OUT; see weldnet fuse --help")
    require_files(settings.networks)
    if len(settings.models) not in (0, 1, len(settings.networks)):
        raise UsageError(
            f"--model is given {len(settings.models)} times for {len(settings.networks)} networks; give it once, or "
            "once for each network in their order"
        )
    for spec in settings.models or [None]:
        require_model(spec, settings.input, settings.networks, "fuse")
        check_specs(spec, settings.input)
    check_route(settings.route)
    check_method(settings.method)
    check_options(settings.method, settings.options)
    check_repair(settings.repair, settings.data)
    if settings.weights is not None:
        weights = settings.weights.values() if isinstance(settings.weights, dict) else settings.weights
        check_weights(list(weights), len(settings.networks))
    check_size(settings.size, len(settings.networks))
    if settings.data is not None:
        check_data(settings.data)


def _check_outputs(settings: FuseConfig) -> None:
    from weldnet.cli._early import (
        REPORT_SUFFIXES,
        WRITTEN_SUFFIXES,
        is_pretrained,
        refuse_overwriting,
        refuse_suffix,
    )
    from weldnet.cli._outputs import WEIGHTS, is_folder, refuse_foreign
    from weldnet.errors import UsageError

    assert settings.output is not None
    folder = is_folder(settings.output)
    if not folder:
        refuse_suffix(settings.output, WRITTEN_SUFFIXES)
    elif not settings.stream and not all(map(is_pretrained, settings.networks)):
        refuse_foreign(settings.output)
    elif os.path.lexists(settings.output):
        raise UsageError(
            f"{str(settings.output)!r} is there already, and a folder of transformers is not replaced; give another"
        )
    if settings.size != 1 and not (settings.output.suffix == ".safetensors" or (folder and settings.models)):
        raise UsageError(
            f"{str(settings.output)!r} has no place for the widths of a network of size {settings.size:g}; "
            "give -o OUT.safetensors"
        )
    if settings.report is not None:
        refuse_suffix(settings.report, REPORT_SUFFIXES)
        if settings.report.suffix == ".html":
            from weldnet.report import require_extra

            require_extra()
    if settings.alignment_out is not None:
        refuse_suffix(settings.alignment_out, (".safetensors",))
    outputs = [path for path in (settings.output, settings.report, settings.alignment_out) if path is not None]
    refuse_overwriting(outputs, settings.networks)
    from weldnet.checkpoints import check_writable

    for path in [settings.output / WEIGHTS if folder else settings.output, *outputs[1:]]:
        check_writable(path)


def _load_data(settings: FuseConfig) -> tuple[Any, Any]:
    """Unlabelled training images for the method and the repair, and the test split for the scores."""
    if settings.data is None:
        return None, None
    from weldnet.cli._data import load_labelled, load_unlabelled
    from weldnet.cli._method import choose_method

    labelled = load_labelled(settings.data, "test")
    looks = settings.method == "auto" or choose_method(settings.method, settings.options).needs_data
    if settings.repair == "none" and not looks:
        return None, labelled
    return load_unlabelled(settings.data, settings.samples), labelled
