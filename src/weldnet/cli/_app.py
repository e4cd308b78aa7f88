"""The commands together, and how each of them ends."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from weldnet._version import __version__
from weldnet.cli._after import Distil, distil, finetune
from weldnet.cli._barrier import barrier
from weldnet.cli._check import check
from weldnet.cli._common import say
from weldnet.cli._compare import compare
from weldnet.cli._demo import demo
from weldnet.cli._evaluate import evaluate
from weldnet.cli._federate import federate
from weldnet.cli._fold import fold
from weldnet.cli._fuse import fuse
from weldnet.cli._inspect import inspect
from weldnet.cli._plane import plane
from weldnet.cli._report import report
from weldnet.cli._reproduce import reproduce
from weldnet.cli._train import train
from weldnet.errors import UsageError, WeldnetError, WeldnetWarning

__all__ = ["app", "main"]

DONE, FAILED, MISUSED, INTERRUPTED = 0, 1, 2, 130
_DEBUG = "--debug"
_COMMANDS = (
    *(demo, fuse, compare, fold, inspect, check, evaluate, barrier, plane),
    *(train, finetune, federate, reproduce, report),
)


class _Interrupted(BaseException):
    """Ctrl-C, under a name that click does not turn into a message of its own."""


class _Group(TyperGroup):
    """Lets an interrupt out as it is, and the commands say what is wrong with a file."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = super().get_command(ctx, cmd_name)
        for parameter in command.params if command is not None else ():
            if isinstance(parameter.type, click.Path):
                parameter.type.readable = False  # click would refuse it in words of its own, and as wrong usage
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        return click.Group.resolve_command(self, ctx, args)  # typer's says "Did you mean" once more than click's

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interrupted(*error.args) from None


app = typer.Typer(
    name="weldnet",
    cls=_Group,
    help="Fuse two or more trained networks into one, without their training data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 the job failed, 2 wrong usage, 130 interrupted. Start with: weldnet demo",
)
for _command in _COMMANDS:
    app.command()(_command)
app.command(cls=Distil)(distil)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"weldnet {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option(_DEBUG, help="Show tracebacks; works before and after the command's name.")
    ] = False,
) -> None:
    """Fuse two or more trained networks into one, without their training data."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        arguments: the words after the program's name; those of this process if None.

    Returns:
        0 done, 1 the job failed, 2 wrong usage, 130 interrupted. Every failure is one line on stderr, unless
        ``--debug`` is among the arguments: then the traceback stands before it.
    """
    debug, rest = _take_debug(list(sys.argv[1:] if arguments is None else arguments))
    try:
        with _terminable(), _warnings_as_lines(debug):
            return _run(rest)
    except BaseException as error:
        if debug and not isinstance(error, click.exceptions.Exit):
            _print_traceback()
        return _end(error)


def _run(arguments: Sequence[str]) -> int:
    code = app(list(arguments), prog_name="weldnet", standalone_mode=False)
    sys.stdout.flush()
    return code if isinstance(code, int) else DONE


def _end(error: BaseException) -> int:
    """Say on one line what went wrong; return the exit code."""
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        typer.echo(error.ctx.get_help(), err=True)
        return MISUSED
    if isinstance(error, _Interrupted | KeyboardInterrupt | click.Abort):
        way_on = error.args[0] if isinstance(error, _Interrupted) and error.args else "no partial file is left"
        say(f"interrupted; {way_on}", kind="error")
        return INTERRUPTED
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        _close_stdout()
        return FAILED
    if isinstance(error, SystemExit | GeneratorExit):
        raise error
    say(_reason(error), kind="error")
    return MISUSED if isinstance(error, UsageError | click.UsageError) else FAILED


def _reason(error: BaseException) -> str:
    if isinstance(error, click.ClickException):
        return _click_reason(error)
    if isinstance(error, WeldnetError):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory; close other programs, or use smaller networks"
    if type(error).__name__ == "OutOfMemoryError":  # of torch, which is not to be imported here
        return f"{str(error).partition('. ')[0]}; give --device cpu, or fewer and smaller inputs"
    return f"{type(error).__name__}: {error}; this is unexpected, use --debug to see where it comes from"


def _click_reason(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "weldnet"
    return f"{error.format_message().rstrip('.')}; see {command} --help"


def _take_debug(arguments: list[str]) -> tuple[bool, list[str]]:
    """Take ``--debug`` out, wherever it stands before a ``--``."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [word for word in arguments[:end] if word != _DEBUG]
    return len(options) < end, options + arguments[end:]


def _print_traceback() -> None:
    import traceback

    traceback.print_exc()


def _close_stdout() -> None:
    # The interpreter flushes stdout once more at its end; there it must not fail again.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _warnings_as_lines(debug: bool) -> Iterator[None]:
    """Show our own warnings as lines; other packages' only for debugging."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        say(str(message) if issubclass(category, WeldnetWarning) else f"{category.__name__}: {message}", kind="warning")

    with warnings.catch_warnings():
        warnings.simplefilter("default" if debug else "ignore")
        warnings.simplefilter("always", WeldnetWarning)
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does, so that it cleans up too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
