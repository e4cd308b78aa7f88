"""``weldnet reproduce``: the tables of the papers, and ours, from data to records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weldnet.cli._common import Json, emit, print_json, say, show

if TYPE_CHECKING:
    from weldnet.experiments import Cell, Done, Executor, Line, Study

__all__ = ["reproduce"]


def reproduce(
    table: Annotated[
        str | None, typer.Argument(metavar="TABLE|CONFIG.yaml", help="A table (see --list), or your own config file.")
    ] = None,
    scale: Annotated[
        str | None, typer.Option("--scale", help="smoke (minutes), cpu (under two hours on two cores) or gpu.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="RUN", help="The run's folder. (default: runs/TABLE-SCALE)")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in that folder.")] = False,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes at most. (default: one a core; one with a GPU)")
    ] = None,
    executor: Annotated[
        str, typer.Option("--executor", help="local (processes of this machine) or ray (a Ray cluster).")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="HOST:PORT",
            help="Of a running Ray cluster; auto finds the one here. (default: start Ray on this machine)",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="KEY=VALUE", help="Cells with that word: method=gamf,naive or networks=2."),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda, instead of what the scale says.", show_default=False)
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", metavar="DIR", help="Trained networks, to share. (default: RUN/networks)")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the tables; with TABLE and --scale, its cells.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the config at that scale.")] = False,
    json: Json = False,
) -> None:
    """Train, fuse and score what a table asks for; records go to the run's folder.

    An interrupted run goes on with --resume and loses at most one epoch of each network in training. What a table asks
    for, and its published numbers, stand in its config: see --print-config. Show the records with: weldnet report RUN
    """
    from weldnet.errors import UsageError

    filters = _filters(only)
    if table is None:
        if not list_:
            raise UsageError("reproduce needs a TABLE; see weldnet reproduce --list")
        return _list_tables(json)
    from weldnet.experiments import resolve

    if list_ and scale is None:
        return _list_tables(json, table)
    study = _on_device(resolve(table, scale), device)
    if print_config:
        return emit(study.to_yaml())
    if list_:
        return _list_cells(study, filters, json)
    folder = output or Path("runs") / f"{study.table.table}-{study.scale}"
    _run(study, folder, resume, _executor(study, workers, executor, address), filters, cache, json)
    return None


def _run(
    study: Study,
    folder: Path,
    resume: bool,
    executor: Executor,
    filters: dict[str, list[str]],
    cache: Path | None,
    json: bool,
) -> None:
    from weldnet.cli._method import check_device
    from weldnet.cli._progress import Progress
    from weldnet.experiments import RayCluster, run_study, summarise

    if not (isinstance(executor, RayCluster) and executor.address):  # its machines have devices of their own
        check_device(study.protocol.device)
    with Progress(f"{study.table.table} {study.scale}") as progress:
        try:
            done = run_study(
                study,
                folder,
                executor=executor,
                only=filters,
                resume=resume,
                cache=cache,
                observer=progress,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"what is done stands in {folder}; go on with the same command and --resume"
            ) from None
    rows = summarise(folder)
    if json:
        print_json({**_document(done), "rows": [row.to_dict() for row in rows]})
    else:
        show(*_tables(rows))
    say(f"wrote {folder}: {done.cells} cells, {done.worked} of them now; show it with weldnet report {folder}")
    if done.failed:
        name, reason = next(iter(done.failed.items()))
        say(f"{len(done.failed)} of {done.cells} cells failed, the records say why: {name}: {reason}", kind="error")
        raise typer.Exit(1)


def _executor(study: Study, workers: int | None, name: str, address: str | None) -> Executor:
    import os

    from weldnet.errors import UsageError
    from weldnet.experiments import Local, RayCluster, available_memory

    if name not in ("local", "ray"):
        raise UsageError(f"--executor {name!r} is unknown; choose local or ray")
    if name == "ray":
        return RayCluster(workers, address, float("inf") if address else 0.8 * available_memory())
    if address is not None:
        raise UsageError("--address is for --executor ray; give that too, or leave it out")

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = 1 if study.protocol.device == "cuda" else max(1, cores // study.protocol.threads)
    return Local(workers or most, 0.8 * available_memory())


def _on_device(study: Study, device: str | None) -> Study:
    from dataclasses import replace

    from weldnet.errors import UsageError

    if device is None:
        return study
    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device {device!r} is unknown; choose cpu or cuda")
    return replace(study, protocol=study.protocol.model_copy(update={"device": device}))


def _filters(only: list[str] | None) -> dict[str, list[str]]:
    from weldnet.errors import UsageError

    found: dict[str, list[str]] = {}
    for pair in only or ():
        key, equals, value = pair.partition("=")
        values = [part.strip() for part in value.split(",") if part.strip()]
        if not equals or not values:
            raise UsageError(f"--only {pair!r} is not KEY=VALUE; write it as in --only method=gamf")
        found.setdefault(key.strip(), []).extend(values)
    return found


def _list_tables(json: bool, name: str | None = None) -> None:
    from weldnet.experiments import load_table, plan, resolve, table_names

    tables: list[dict[str, Any]] = []
    for source in [name] if name is not None else table_names():
        loaded = load_table(source)
        for scale, about in loaded.scales.items():
            cells = plan(resolve(source, scale))
            tables.append(
                {
                    "table": loaded.table,
                    "title": loaded.title,
                    "scale": scale,
                    "about": about.about,
                    "cells": len(cells),
                    "networks": sum(made.kind == "network" for cell in cells for made in cell.makes),
                    "core_seconds": round(sum(cell.cost for cell in cells)),
                }
            )
    if json:
        return print_json({"tables": tables})
    rows = [
        (
            t["table"],
            t["scale"],
            str(t["networks"]),
            str(t["cells"]),
            _hours(t["core_seconds"]),
            t["about"] or t["title"],
        )
        for t in tables
    ]
    show(_table("table scale networks cells core-hours about", rows))
    return say("core-hours are estimates for one core of a server; a GPU is some hundred times as fast", kind="note")


def _list_cells(study: Study, filters: dict[str, list[str]], json: bool) -> None:
    from weldnet.experiments import plan

    cells: list[Cell] = plan(study, filters)
    if json:
        listed = [
            {"name": c.name, "makes": [dict(m.words) for m in c.makes], "core_seconds": round(c.cost, 1)} for c in cells
        ]
        return print_json({"table": study.table.table, "scale": study.scale, "cells": listed})
    rows = [(cell.name, str(len(cell.makes)), _hours(cell.cost)) for cell in cells]
    return show(_table("cell records core-hours", rows))


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f}" if seconds >= 360 else f"{seconds / 3600:.3f}"


def _document(done: Done) -> dict[str, Any]:
    return {"run": done.folder, "cells": done.cells, "worked": done.worked, "failed": dict(done.failed)}


def _tables(rows: Any) -> list[Any]:
    """Return one table for each setting."""
    found: list[Any] = []
    for setting in dict.fromkeys(row.setting for row in rows):
        cells = [(r.method, r.repair or "", r.stage, *_numbers(r)) for r in rows if r.setting == setting]
        table = _table("method repair stage accuracy published barrier published", cells)
        table.title, table.title_justify = setting, "left"
        found.append(table)
    return found


def _numbers(row: Line) -> list[str]:
    return [text for name in ("accuracy", "barrier") for text in (row.ours(name), row.published(name))]


def _table(headings: str, rows: Any) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    words = headings.split()
    numbers = {"networks", "cells", "core-hours", "records", "accuracy", "published", "barrier"}
    for word in words:
        table.add_column(word, justify="right" if word in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
