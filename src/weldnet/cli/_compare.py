"""``weldnet compare``: every method with every repair, on the same checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weldnet.cli._common import (
    Checkpoints,
    Data,
    Device,
    FolderInput,
    FolderModel,
    Json,
    Outputs,
    Seed,
    Written,
    emit,
    interactive,
    parse_outputs,
    print_json,
    say,
    stray_prints_to_stderr,
)

if TYPE_CHECKING:
    from weldnet.fusion import Comparison

__all__ = ["COLUMNS", "compare"]

COLUMNS = ("method", "repair", "accuracy", "loss", "calibration_error", "barrier", "seconds", "memory", "samples")
"""What the table can be sorted by."""


def compare(
    checkpoints: Checkpoints,
    data: Data,
    model: FolderModel = None,
    example_input: FolderInput = None,
    methods: Annotated[
        str, typer.Option("--methods", metavar="NAME,...", help="Methods, or all; options: gamf:sigma=4:tau=0.5.")
    ] = "all",
    repairs: Annotated[str, typer.Option("--repairs", metavar="NAME,...", help="Repairs, or all.")] = "auto",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Unlabelled images for methods and repairs.")] = 512,
    points: Annotated[int, typer.Option("--points", min=0, help="On the line of the barrier; 0 leaves it out.")] = 11,
    sort: Annotated[
        str | None, typer.Option("--sort", metavar="COLUMN", help="accuracy, loss, calibration_error, seconds, ...")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Prove that renumbering keeps every parent.")
    ] = True,
    outputs: Outputs = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the table: .json, .csv or .txt.")
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of text.")] = False,
    seed: Seed = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Fuse checkpoints with every method and every repair, and put the results side by side.

    The train split of --data gives unlabelled images, its test split the scores. A combination that fails is a row with
    its reason; the exit code is 1 if none worked. Nothing is written but the table.
    """
    from weldnet.cli._early import (
        METHOD_NAMES,
        REPAIR_NAMES,
        check_data,
        check_options,
        close,
        refuse_overwriting,
        refuse_suffix,
        require_files,
        require_model,
    )
    from weldnet.cli._specs import check_specs
    from weldnet.errors import UsageError

    if len(checkpoints) < 2:
        raise UsageError(f"comparing needs two networks or more and got only {str(checkpoints[0])!r}")
    if csv and json:
        raise UsageError("--csv and --json print different things; give one of them")
    if points == 1:
        raise UsageError("--points 1 is no line; give 2 or more, or 0 to leave the barrier out")
    if sort is not None and sort not in COLUMNS:
        raise UsageError(f"--sort {sort!r} is no column{close(sort, COLUMNS)}; give one of {', '.join(COLUMNS)}")
    asked = _split_options(methods)
    _names("--methods", ",".join(name for name, _ in asked), METHOD_NAMES, ("auto",))
    for name, options in asked:
        check_options(name, options)
    mended = _names("--repairs", repairs, REPAIR_NAMES, ())
    require_files(checkpoints)
    require_model(model, example_input, checkpoints, "compare")
    check_specs(model, example_input)
    check_data(data)
    if output is not None:
        refuse_suffix(output, (".json", ".csv", ".txt"))
        refuse_overwriting([output], checkpoints)
    from weldnet.checkpoints import check_writable
    from weldnet.cli._data import load_labelled, load_unlabelled
    from weldnet.cli._input import make_input
    from weldnet.cli._method import check_device, choose_method
    from weldnet.cli._networks import gather_networks
    from weldnet.fusion import compare as run

    if output is not None:
        check_writable(output)
    written = Written.soon(output)
    check_device(device)
    chosen = [choose_method(name, options) if options else name for name, options in asked]
    for method in chosen:
        check_device(device, None if isinstance(method, str) else method)
    networks = gather_networks(model, checkpoints)
    labelled, unlabelled = load_labelled(data, "test"), load_unlabelled(data, samples)
    with stray_prints_to_stderr():
        found = run(
            networks,
            make_input(example_input, next(iter(networks.values())), seed=seed),
            methods=chosen,
            repairs=mended,
            evaluate_on=labelled,
            data=unlabelled,
            samples=samples,
            outputs=parse_outputs(outputs),
            points=points,
            check=check,
            seed=seed,
            device=device,
            progress=interactive(),
        )
    if json:
        print_json(_document(found, sort, networks, data))
    else:
        emit(found.to_csv(sort) if csv else found.text(sort))
    if output is not None:
        _write(found, sort, output, _document(found, sort, networks, data))
        written.say()
    if not found.worked:
        say("no combination worked; the rows say why", kind="error")
        raise typer.Exit(1)


def _split_options(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Read methods with commas between, each with its options behind colons; ``all`` are all of them.

    Raises:
        UsageError: an option that is not KEY=VALUE, or options of ``auto``.

    >>> _split_options("gamf, gamf:sigma=4:tau=0.5")
    [('gamf', {}), ('gamf', {'sigma': 4, 'tau': 0.5})]
    """
    from weldnet.cli._common import parse_options
    from weldnet.cli._early import METHOD_NAMES
    from weldnet.errors import UsageError

    parts = [part.strip() for part in text.split(",") if part.strip()]
    found = []
    for part in dict.fromkeys(METHOD_NAMES if parts == ["all"] else parts):
        name, *pairs = part.split(":")
        for pair in pairs:
            if "=" not in pair:
                raise UsageError(f"--methods: {pair!r} in {part!r} is not KEY=VALUE; write it as in gamf:sigma=4")
        if name == "auto" and pairs:
            raise UsageError(f"--methods: {part!r} gives options to a method that is not chosen yet; name the method")
        found.append((name, parse_options(pairs)))
    return found


def _names(option: str, text: str, known: tuple[str, ...], more: tuple[str, ...]) -> list[str]:
    """Read names with commas between; ``all`` are the known ones.

    Raises:
        UsageError: an unknown name, or none.
    """
    from weldnet.cli._early import close
    from weldnet.errors import UsageError

    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    names = list(known) if names == ["all"] else names
    if not names:
        raise UsageError(f"{option} {text!r} names nothing; give names with commas between, or all")
    for name in names:
        if name not in (*known, *more):
            raise UsageError(f"{option}: unknown name {name!r}{close(name, known)}; weldnet has {', '.join(known)}")
    return names


def _document(found: Comparison, sort: str | None, networks: Iterable[str], data: str) -> dict[str, object]:
    from dataclasses import asdict

    rows = [asdict(row) for row in found.sorted(sort)]
    return {"networks": list(networks), "data": data, **found.to_dict(), "rows": rows}


def _write(found: Comparison, sort: str | None, path: Path, document: dict[str, object]) -> None:
    from weldnet.checkpoints import atomic_path
    from weldnet.cli._common import as_json

    texts = {".csv": lambda: found.to_csv(sort), ".txt": lambda: found.text(sort) + "\n"}
    text = texts.get(path.suffix, lambda: as_json(document) + "\n")()
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
