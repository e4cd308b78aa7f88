"""``weldnet federate``: a federated run from a config, on one of three engines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weldnet.cli._common import Json, emit, print_json, say

if TYPE_CHECKING:
    from weldnet.federated.flower import Plan
    from weldnet.records import Record

__all__ = ["federate"]


def federate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The settings: a YAML file (docs/federated.md).")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="RUN", help="The run's folder. (default: runs/ and CONFIG's name)"),
    ] = None,
    engine: Annotated[
        str,
        typer.Option("--engine", help="local (this process), ray (simulation) or superlink (deployment)."),
    ] = "local",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what is in RUN.")] = False,
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, help="How many of the clients there are. (default: all)")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", metavar="S", help="Seconds that clients have to answer. (default: all)")
    ] = None,
    patience: Annotated[float, typer.Option("--patience", metavar="S", help="Seconds to wait for nodes.")] = 600,
    join: Annotated[
        str | None, typer.Option("--join", metavar="HOST:PORT", help="Run on a SuperLink that is there already.")
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", help="Of the SuperLink that is started. (default: a free one)")
    ] = None,
    certificates: Annotated[
        Path | None,
        typer.Option("--certificates", metavar="DIR", help="TLS: ca.crt, server.pem and server.key; ca.crt to join."),
    ] = None,
    keys: Annotated[bool, typer.Option("--keys", help="Let only SuperNodes in whose keys are registered.")] = False,
    write_app: Annotated[
        Path | None, typer.Option("--write-app", metavar="DIR", help="Only write a Flower app, for flwr run DIR.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="cpu, cuda, ..., instead of what CONFIG says.", show_default=False),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all settings of CONFIG as YAML and stop.")
    ] = False,
    json: Json = False,
) -> None:
    """Train a model on clients that keep their data; the server fuses their networks, round by round.

    RUN gets records.jsonl, the server's state after every round, and at the end global.safetensors. All engines give
    the same weights, bit for bit.
    """
    from weldnet.federated import FederatedConfig
    from weldnet.federated.flower import Plan
    from weldnet.federated.flower import write_app as write

    settings = FederatedConfig.read(config)
    if device is not None:
        settings = settings.model_copy(update={"device": device})
    if print_config:
        print_json(settings.model_dump(mode="json")) if json else emit(settings.to_yaml())
        return
    out = output or Path("runs") / config.stem
    plan = Plan(
        engine=engine,  # pyright: ignore[reportArgumentType]  (the plan says what it knows)
        nodes=nodes,
        timeout=timeout,
        patience=patience,
        resume=resume,
        join=join,
        port=port,
        certificates=certificates,
        authenticate=keys,
    )
    if write_app is not None:
        folder = write(write_app, plan.settings(settings, out.resolve()))
        print_json({"app": folder}) if json else say(f"wrote {folder}; run it with: flwr run {folder} LINK")
        return
    _run(settings, out, plan, json)


def _run(settings: Any, out: Path, plan: Plan, json: bool) -> None:
    from weldnet.federated.flower import describe, federate
    from weldnet.records import FILE, read

    start = time.perf_counter()
    model = federate(settings, out, plan, on_round=lambda record: say(describe(record)), tell=lambda line: say(line))
    seconds = time.perf_counter() - start
    known = read(out).of("round") if (out / FILE).exists() else []
    rounds = [record for record in known if record.key.startswith(f"{settings.key()}-")]
    if json:
        shown = [{**record.cell, **record.values, "extra": dict(record.extra)} for record in rounds]
        print_json({"model": model, "engine": plan.engine, "seconds": seconds, "rounds": shown})
    else:
        emit(_summary(rounds, seconds))
    if model.exists():
        say(f"wrote {model}")


def _summary(rounds: list[Record], seconds: float) -> str:
    scored = [record for record in rounds if record.values.get("accuracy") is not None]
    if not scored:
        return f"{len(rounds)} rounds, {seconds:.1f} s"
    last = scored[-1]
    return f"test accuracy {last.values['accuracy']:.2%} after round {last.cell['round']}, {seconds:.1f} s"
