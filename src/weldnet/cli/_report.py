"""``weldnet report``: the records of a run as a page, a table, or data."""

from __future__ import annotations

from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weldnet.cli._common import Json, Written, emit, print_json, say

if TYPE_CHECKING:
    from weldnet.report import Page

__all__ = ["report"]

FORMATS = ("html", "md", "csv")
_FIGURES = "svg,png"


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a file of records.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write it: .html, .md or .csv.")
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option("--format", metavar="|".join(FORMATS), help="(default: what FILE's extension says; md on stdout)"),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option("--figures", metavar="DIR", help="Also write every figure there; needs kaleido and a Chrome."),
    ] = None,
    figure_formats: Annotated[
        str, typer.Option("--figure-formats", metavar="NAME,...", help="svg, png, pdf.")
    ] = _FIGURES,
    title: Annotated[str | None, typer.Option("--title", help="Of the page. (default: the run's)")] = None,
    json: Json = False,
) -> None:
    """Show what a study measured, beside what papers published.

    HTML is one file that needs no network. Without -o the tables are printed as Markdown; --json prints all numbers.
    Lines of the records that cannot be read are skipped and counted.
    """
    chosen = _format(output, format_, json)
    names = [name.strip() for name in figure_formats.split(",") if name.strip()]
    _check(run, output, chosen, figures, names)
    from weldnet.records import read
    from weldnet.report import build, export_figures

    records = read(run)
    if not records.all:
        _refuse_document(run)
    page = build(records, title=title)
    if records.corrupt:
        lines = "1 line" if records.corrupt == 1 else f"{records.corrupt} lines"
        say(f"{run}: {lines} of the records could not be read and are left out", kind="warning")
    written = Written.soon(output)
    if output is not None:
        _write(_text(page, chosen), output)
        written.say()
    if json:
        from weldnet.report import to_dict

        print_json(to_dict(page))
    elif output is None and (figures is None or format_ is not None):
        emit(_text(page, chosen))
    if figures is not None:
        drawn = export_figures(page, figures, names)
        say(f"wrote {len(drawn)} files to {figures}" if drawn else "there are no figures to write")


def _refuse_document(file: Path) -> None:
    """Raise RecordError for a file that is JSON but no records, such as the report of one fusion."""
    from weldnet.errors import RecordError

    try:
        document = loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    one = isinstance(document, dict) and {"rows", "method", "repair"} <= document.keys()
    what = "is the report of one fusion" if one else "is JSON, but not one record a line"
    way = "its page is what weldnet fuse --report page.html writes" if one else "give the folder of a run"
    raise RecordError(f"{str(file)!r} {what}, and this command shows the records of a study; {way}")


def _format(output: Path | None, given: str | None, json: bool) -> str:
    """Return what to write, by the option, or by the file's extension."""
    from weldnet.cli._early import close, refuse_suffix
    from weldnet.errors import UsageError

    if given is not None and given not in FORMATS:
        raise UsageError(f"--format {given!r} is unknown{close(given, FORMATS)}; give one of {', '.join(FORMATS)}")
    if json and output is None and given is not None:
        raise UsageError(f"--json and --format {given} both print on stdout; give one of them, or -o FILE")
    if given is not None:
        return given
    if output is None:
        return "md"
    refuse_suffix(output, tuple(f".{name}" for name in FORMATS))
    return output.suffix.removeprefix(".")


def _check(run: Path, output: Path | None, chosen: str, figures: Path | None, names: list[str]) -> None:
    """Refuse what cannot be meant, before anything is read."""
    from weldnet.cli._early import refuse_overwriting
    from weldnet.errors import UsageError
    from weldnet.records import FILE
    from weldnet.report import FORMATS as DRAWN
    from weldnet.report import require_exporter, require_extra

    if chosen == "html":
        require_extra()
    if figures is not None:
        unknown = [name for name in names if name not in DRAWN]
        if unknown or not names:
            found = repr(unknown[0]) if unknown else "nothing"
            raise UsageError(f"--figure-formats names {found}; choose from {', '.join(DRAWN)}")
        require_exporter()
    if output is not None:
        from weldnet.checkpoints import check_writable

        refuse_overwriting([output], [run / FILE if run.is_dir() else run])
        check_writable(output)


def _text(page: Page, chosen: str) -> str:
    from weldnet.report import to_csv, to_html, to_markdown

    return {"html": to_html, "md": to_markdown, "csv": to_csv}[chosen](page)


def _write(text: str, path: Path) -> None:
    from weldnet.checkpoints import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
