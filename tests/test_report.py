"""The report's page: its numbers, what stands apart, what it may not do."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from report_records import METHODS, SOURCE, study
from weldnet.cli import main
from weldnet.errors import RecordError, UsageError
from weldnet.records import FILE, Record, Records
from weldnet.report import Page, build, export_figures, to_csv, to_dict, to_html, to_markdown
from weldnet.report._page import Cell, Table

PLACE = {"dataset": "mnist", "architecture": "mlp", "networks": 2}


def result(method: str, group: int = 0, kind: Any = "result", source: str = "", **values: float) -> Record:
    cell = {**PLACE, "method": method, "group": group, "stage": "one-shot"}
    return Record(kind=kind, cell=cell, values=values, source=source)


def published(method: str, accuracy: float, source: str = SOURCE) -> Record:
    cell = {**PLACE, "method": method}
    return Record(kind="published", cell=cell, values={"accuracy": accuracy}, source=source)


def made_of(*records: Record) -> Page:
    return build(Records(tuple(records)))


def table(page: Page, section: str, index: int = 0) -> Table:
    blocks = next(s for s in page.sections if s.name == section).blocks
    return [block for block in blocks if isinstance(block, Table)][index]


def row(table: Table, name: str) -> tuple[Cell, ...]:
    return next(row.cells for row in table.rows if row.cells[0].text == name)


@pytest.fixture(scope="module")
def page() -> Page:
    return build(Records(tuple(study()), corrupt=2))


@pytest.fixture(scope="module")
def html(page: Page) -> str:
    return to_html(page)


@pytest.fixture(scope="module")
def own(html: str) -> str:
    """The page without plotly.js."""
    return re.sub(r"<script>/\*\*?\s*\n?\s*\* plotly\.js.*?</script>", "", html, count=1, flags=re.DOTALL)


# -- numbers -----------------------------------------------------------------------------------------


def test_means_and_sample_deviations_are_right():
    numbers = (0.80, 0.82, 0.87)
    page = made_of(*(result("gamf", group, accuracy=number) for group, number in enumerate(numbers)))
    (found,) = page.numbers
    assert found["mean"] == pytest.approx(0.83)
    assert found["deviation"] == pytest.approx(statistics.stdev(numbers))
    cell = row(table(page, "measurements"), "GAMF")[-1]
    assert (cell.text, cell.spread) == ("83.00", "3.61")


def test_fine_tuned_networks_stand_beside_the_same_parents():
    tuned = Record(kind="result", cell={**PLACE, "method": "gamf", "stage": "fine-tuned"}, values={"accuracy": 0.9})
    four = Record(kind="result", cell={**dict(tuned.cell), "networks": 4}, values={"accuracy": 0.7})
    page = made_of(result("best parent", accuracy=0.8), result("naive", accuracy=0.2), tuned, four)
    rows = [[cell.text for cell in row.cells[2:]] for row in table(page, "glance").rows]
    assert ["90.00", "80.00", "", ""] in rows  # the naive average was not fine-tuned
    assert ["70.00", "", "", ""] in rows  # other parents


def test_a_single_number_has_no_deviation():
    cell = row(table(made_of(result("gamf", accuracy=0.5)), "measurements"), "GAMF")[-1]
    assert (cell.text, cell.spread) == ("50.00", "")


def test_other_words_of_a_cell_are_never_averaged_over():
    one, two = (
        Record(kind="result", cell={**PLACE, "method": "gamf", "sigma": s}, values={"accuracy": s / 10}) for s in (1, 3)
    )
    page = made_of(one, two)
    assert [cells.cells[0].text for cells in table(page, "measurements").rows] == ["GAMF, sigma 1", "GAMF, sigma 3"]
    assert [figure.title for figure in page.figures if "sigma" in figure.title] == ["Accuracy against sigma"]


def test_the_best_fused_network_is_bold_and_parents_do_not_compete():
    page = made_of(
        result("individual", accuracy=0.99),
        result("ensemble", accuracy=0.995),
        result("naive", accuracy=0.3, loss=2.0),
        result("gamf", accuracy=0.9, loss=0.5),
        result("weight_matching", accuracy=0.8, loss=0.4),
    )
    found = table(page, "measurements")
    best = {(cells.cells[0].text, at) for cells in found.rows for at, cell in enumerate(cells.cells) if cell.best}
    assert [column.label for column in found.columns] == ["network", "accuracy, %", "loss"]
    assert best == {("GAMF", 1), ("Weight matching", 2)}  # of accuracy the highest, of loss the lowest


def test_equal_numbers_are_equally_good():
    found = table(
        made_of(*(result(name, loss=0.5) for name in ("gamf", "naive")), result("fold", loss=0.6)), "measurements"
    )
    assert {cells.cells[0].text for cells in found.rows if cells.cells[1].best} == {"GAMF", "Naive average"}


def test_published_numbers_have_columns_of_their_own():
    ours = [result("gamf", group, accuracy=0.8 + group / 100) for group in range(3)]
    quoted = [published("gamf", 0.7), published("optimal_transport", 0.9)]
    found = table(made_of(*ours, *quoted), "methods")
    assert [column.origin for column in found.columns] == ["", "measured", "published"]
    assert [cell.text for cell in row(found, "GAMF")] == ["GAMF", "81.00", "70.00"]
    assert [cell.text for cell in row(found, "OTFusion")] == ["OTFusion", "", "90.00"]
    assert row(found, "OTFusion")[2].best  # of its own column
    assert not row(found, "GAMF")[1].best  # nothing competes with it where we measured
    assert found.notes == (("a", SOURCE),)
    assert row(found, "GAMF")[2].mark == "a"


def test_what_is_published_changes_nothing_that_was_measured():
    def measured(accuracy: float) -> list[Any]:
        page = made_of(*(result("gamf", group, accuracy=0.8) for group in range(2)), published("gamf", accuracy))
        return [entry for entry in page.numbers if entry["origin"] == "measured"]

    assert measured(0.1) == measured(0.9)
    assert measured(0.1)[0]["n"] == 2


def test_two_papers_on_the_same_thing_are_not_averaged():
    found = table(
        made_of(result("gamf", accuracy=0.8), published("gamf", 0.6, "one"), published("gamf", 0.7, "two")), "methods"
    )
    assert [column.label for column in found.columns] == ["method", "measured", "published", "published"]
    assert [cell.text for cell in row(found, "GAMF")][1:] == ["80.00", "60.00", "70.00"]


def test_options_of_a_method_are_words_of_their_own():
    page = made_of(
        *(result(f"gamf sigma={sigma}", accuracy=sigma / 10) for sigma in (1.0, 4.0)), result("gamf", accuracy=0.9)
    )
    names = [cells.cells[0].text for cells in table(page, "measurements").rows]
    assert names == ["GAMF, sigma 1", "GAMF, sigma 4", "GAMF"]
    figure = next(figure for figure in page.figures if figure.title == "Accuracy against sigma")
    assert figure.traces[0]["x"] == [1.0, 4.0]
    assert figure.series[0].colour == "@gamf"


def test_synthetic_data_is_named_at_the_top():
    cell = {**PLACE, "dataset": "cifar100 (synthetic data)", "method": "gamf"}
    page = made_of(Record(kind="result", cell=cell, values={"accuracy": 0.5}))
    assert "They are no results" in page.warnings[0]
    assert "CIFAR-100 (synthetic data)" in table(page, "measurements").title


def test_a_pooled_coupling_says_how_many_units_there_were():
    spaces = {"fc": {"units": [400, 300], "matrix": [[0.1, 0.0], [0.0, 0.1]]}}
    (figure,) = made_of(Record(kind="couplings", extra={"spaces": spaces})).figures
    assert "400 \u00d7 300 units" in figure.caption
    assert figure.traces[0]["dx"] == 200


def test_failures_are_shown_with_their_reason(page: Page):
    found = table(page, "measurements", -1)
    assert found.title == "Failed: 2 results"
    assert {"out of memory: 12 GB are needed"} == {cells.cells[3].text for cells in found.rows}


def test_differences_are_taken_between_runs_of_one_seed():
    def rounds(rule: str, seed: int, accuracy: float, sent: float) -> list[Record]:
        cell = {"dataset": "mnist", "clients": 5, "rule": rule, "seed": seed}
        values = {"accuracy": accuracy, "bytes": sent}
        return [Record(kind="round", cell={**cell, "round": n}, values=values, seed=seed) for n in (1, 2)]

    page = made_of(
        *rounds("fedavg", 0, 0.50, 1e6),
        *rounds("fedavg", 1, 0.90, 1e6),
        *rounds("gamf", 0, 0.53, 2e6),
        *rounds("gamf", 1, 0.94, 2e6),
    )
    found = table(page, "federated")
    cells = row(found, "GAMF")
    assert [column.label for column in found.columns[2:4]] == ["accuracy, %", "paired change"]
    assert (cells[3].text, cells[3].spread, cells[3].mark) == ("+3.50", "0.71", "2/2")
    assert row(found, "FedAvg")[3].text == ""
    assert {"Accuracy by round", "Accuracy by what was sent", "Paired change of accuracy against FedAvg"} <= {
        f.title for f in page.figures
    }


def test_rounds_may_tell_what_went_up_from_what_went_down():
    def rounds(rule: str) -> list[Record]:
        cell = {"clients": 2, "rule": rule, "align_at": "server", "seed": 0}
        values = {"accuracy": 0.5, "bytes_up": 1e6, "bytes_down": 2e6}
        extra = {"moved": {"0": 0.2, "1": 0.4}}
        return [Record(kind="round", cell={**cell, "round": n}, values=values, extra=extra) for n in (1, 2)]

    page = made_of(*rounds("fedavg"), *rounds("gamf"))
    found = table(page, "federated")
    assert [cells.cells[0].text for cells in found.rows] == ["FedAvg", "GAMF"]  # what all have in common is left out
    assert row(found, "GAMF")[-2].text == "6.00"  # MB
    moved = next(figure for figure in page.figures if figure.title == "Units moved by round")
    assert moved.traces[0]["y"] == [30.0, 30.0]


def test_a_table_of_federated_results_stands_beside_the_published_one():
    words = {"dataset": "cifar10", "partition": "dirichlet 0.5", "architecture": "vgg11", "networks": 5}
    run = {"clients": 5, "algorithm": "sgd", "server_optimiser": "sgd", "align_at": "server", "repair": "none"}
    records = [Record(kind="published", cell={**words, "method": "gamf"}, values={"accuracy": 0.83}, source=SOURCE)]
    for method, gain in (("fedavg", 0.0), ("gamf", 0.01), ("gamf-joint", 0.02)):
        for seed in (0, 1):
            for number in (1, 2):
                cell = {**words, **run, "method": method, "rule": method, "group": seed, "seed": seed, "round": number}
                values = {"accuracy": 0.4 + gain + number / 10}
                records.append(
                    Record(kind="round", cell={**cell, "stage": f"round {number}"}, values=values, seed=seed)
                )
            records.append(Record(kind="result", cell={**cell, "stage": "round 2"}, values=values, seed=seed))
    page = made_of(*records)
    found = table(page, "methods")
    assert [(column.group, column.label) for column in found.columns[1:]] == [
        ("5 networks", "published"),
        ("5 networks, round 2", "measured"),
    ]
    assert [cell.text for cell in row(found, "GAMF")] == ["GAMF", "83.00", "61.00"]
    assert row(found, "GAMF, joint")[2].best
    rounds = table(page, "federated")
    assert [cells.cells[0].text for cells in rounds.rows] == ["FedAvg", "GAMF", "GAMF, joint"]
    assert row(rounds, "GAMF, joint")[3].text == "+2.00"


def test_a_repair_is_seen_layer_by_layer():
    ratios = [{"fc1": [0.2, 0.9]}, {"fc1": [0.4, 1.1]}]
    cell = {**PLACE, "method": "gamf", "repair": "refit"}
    records = [
        Record(kind="result", cell={**cell, "group": i}, values={"accuracy": 0.5}, extra={"variances": v})
        for i, v in enumerate(ratios)
    ]
    figure = next(f for f in made_of(*records).figures if f.name.startswith("variances"))
    assert [trace["y"] for trace in figure.traces] == [[0.3], [1.0]]


def test_couplings_keep_their_mass_however_many_units(page: Page):
    import base64

    import numpy as np

    large = next(figure for figure in page.figures if figure.title == "features.3")
    z = large.traces[0]["z"]
    pixels = np.frombuffer(base64.b64decode(z["bdata"]), dtype=np.uint8)
    step = large.traces[0]["dx"]
    assert (step, z["shape"]) == (3, "100, 100")
    assert pixels.sum() / pixels.max() * 3 >= 300 * 0.98  # 300 units; at most three of them meet in a square
    assert "300 × 300 units" in large.caption  # noqa: RUF001


# -- sections ----------------------------------------------------------------------------------------

SECTIONS = {
    "result": ["glance", "measurements", "sweeps", "variances", "spaces"],
    "curve": ["barriers"],
    "couplings": ["couplings"],
    "network": ["training"],
}


@pytest.mark.parametrize("kind", SECTIONS)
def test_a_section_is_there_only_if_there_are_records_for_it(page: Page, kind: str):
    without = build(Records(tuple(record for record in study() if record.kind != kind)))
    assert set(SECTIONS[kind]) <= {section.name for section in page.sections}
    assert not set(SECTIONS[kind]) & {section.name for section in without.sections}


@pytest.mark.parametrize("kind", ["run", "published", "network", "result", "curve", "couplings", "round"])
def test_a_page_can_be_made_of_any_one_kind(kind: str):
    page = build(Records(tuple(record for record in study() if record.kind == kind)))
    assert "provenance" in {section.name for section in page.sections}
    assert to_html(page).startswith("<!doctype html>")


def test_nothing_odd_in_a_record_breaks_the_page():
    odd: list[Any] = [None, "x", [], {}, [1, "a"], {"a": "b"}, [[1.0], [1.0, 2.0]], float("nan")]
    records = [
        Record(kind=kind, cell={"method": "gamf"}, values={"accuracy": None}, extra={name: value})
        for kind, name in (("curve", "y"), ("curve", "x"), ("couplings", "spaces"), ("network", "history"))
        for value in odd
    ]
    records += [Record(kind="result", extra={"variances": value, "spaces": value, "error": None}) for value in odd]
    records += [Record(kind="round", cell={"round": value}) for value in ("x", None, 1)]
    assert "<main" in to_html(build(Records(tuple(records))))


def test_provenance_says_everything(page: Page, own: str):
    for text in (
        "0123456789ab",
        "2.13.0",
        "Example CPU @ 2.00GHz",
        "weldnet reproduce cifar10-vgg11",
        "0, 1, 2, 3",
        "2 lines",
    ):
        assert text in own
    assert page.provenance["corrupt"] == 2
    assert SOURCE in page.provenance["sources"]


# -- HTML --------------------------------------------------------------------------------------------


def test_the_page_is_one_small_file_that_loads_nothing(html: str, own: str):
    assert len(html.encode()) < 6_000_000
    assert len(own) < len(html) - 4_000_000  # plotly.js was taken out, once
    assert "plotly.js v" not in own
    loads = re.findall(r"""(?:src|href|action|data)=["'](?!#|data:)""", own)
    assert loads == []
    assert not re.search(r"url\(|@import|\bfetch\(|XMLHttpRequest|https?:", own)
    assert "default-src 'none'" in html


def test_a_page_without_figures_carries_no_plotly():
    page = made_of(result("gamf", accuracy=0.5))
    assert page.figures == ()
    assert len(to_html(page)) < 60_000


NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'|`*_{{ 1 }}%{x}"


def test_everything_from_records_is_escaped(own: str):
    nasty = {"dataset": NASTY, "architecture": NASTY, "partition": NASTY, "networks": 2, "method": NASTY, NASTY: NASTY}
    records = [
        Record(
            kind="run",
            extra={"title": NASTY, "notes": [NASTY], "warning": NASTY, "command": NASTY, NASTY: {NASTY: NASTY}},
        ),
        *(
            Record(
                kind="result", cell={**nasty, "group": g}, values={"accuracy": 0.5, NASTY: 1.0}, where={NASTY: NASTY}
            )
            for g in (0, 1)
        ),
        Record(
            kind="result",
            cell={**nasty, "repair": NASTY},
            values={"accuracy": 0.4},
            extra={"variances": {NASTY: [0.1, 0.2]}},
        ),
        Record(kind="result", cell=nasty, extra={"error": NASTY, "spaces": [{"space": NASTY, "units": 3}]}),
        Record(kind="published", cell=nasty, values={"accuracy": 0.1}, source=NASTY),
        Record(kind="curve", cell=nasty, extra={"x": [0, 1], "y": {NASTY: [0, 1]}, "about": NASTY, "x_label": NASTY}),
        Record(kind="couplings", cell=nasty, extra={"spaces": {NASTY: [1, 0]}}),
        Record(kind="network", cell=nasty, extra={"history": [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 0.5}]}),
        Record(kind="round", cell={**nasty, "rule": NASTY, "clients": 2, "round": 1}, values={"accuracy": 0.5}),
    ]
    written = to_html(made_of(*records))
    assert written.count("<script") == own.count("<script") + 1
    assert "<img" not in written
    assert "alert(1)" in written  # it is there, as text
    data = written.partition('<script type="application/json" id="figures">')[2].partition("</script>")[0]
    figures = json.loads(data)["figures"]
    texts = json.dumps([[f["traces"], f["layout"]] for f in figures.values()])
    assert "<script" not in texts  # Plotly would read it as markup
    assert "<img" not in to_markdown(made_of(*records)).replace("\\<img", "")


def test_every_method_has_a_name_a_colour_and_a_mark_of_its_own():
    from weldnet.alignment import METHODS
    from weldnet.report._colours import PALETTES, assign, symbol
    from weldnet.report._summary import method_text

    names = [*METHODS, "individual", "best parent", "ensemble", "naive", "fold"]
    assert assign(names) == {name: name for name in names}
    assert all(method_text(name) != name for name in names)
    for palette in PALETTES.values():
        assert len({palette[name] for name in names}) == len(names)
    assert len({symbol(name) for name in names}) >= len(names) - 1  # identity and naive are one thing


def test_every_figure_is_described_in_words(page: Page, own: str):
    assert len({figure.name for figure in page.figures}) == len(page.figures)
    for figure in page.figures:
        assert len(figure.alt) > 20
        assert re.fullmatch(r"[a-z0-9-]+", figure.name)
    assert own.count('role="img"') == len(page.figures)


def test_a_method_has_one_colour_everywhere(page: Page):
    found: dict[str, set[str]] = {}
    for figure in page.figures:
        for series in figure.series:
            found.setdefault(series.label.split(" + ")[0].split(",")[0], set()).add(series.colour)
    assert found["GAMF"] == {"@gamf"}
    assert found["OTFusion"] == {"@optimal_transport"}
    assert len(set.union(*(found[name] for name in ("GAMF", "OTFusion", "Weight matching", "Naive average")))) == 4


# -- Markdown, CSV, JSON -----------------------------------------------------------------------------


def test_markdown_has_the_table_for_a_paper():
    text = to_markdown(
        made_of(
            result("gamf", 0, accuracy=0.8),
            result("gamf", 1, accuracy=0.9),
            result("naive", accuracy=0.1),
            published("gamf", 0.7),
        )
    )
    assert "| method | 2 networks, one-shot: measured | 2 networks, one-shot: published |" in text
    assert "| GAMF | **85.00** ± 7.07" in text
    assert f"- [a] {SOURCE}" in text


def test_csv_is_tidy(page: Page):
    rows = list(csv.DictReader(io.StringIO(to_csv(page))))
    assert len(rows) == len(page.numbers)
    ours = [r for r in rows if r["method"] == "gamf" and r["metric"] == "accuracy" and r["origin"] == "measured"]
    assert {r["n"] for r in ours} == {"5"}
    assert {r["source"] for r in ours} == {""}
    assert all(r["source"] for r in rows if r["origin"] == "published")
    assert set(METHODS) <= {r["method"] for r in rows}


# -- the command -------------------------------------------------------------------------------------

Refused = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    lines = [record.to_json() for record in (result("gamf", accuracy=0.8), result("naive", accuracy=0.2))]
    Path("run", FILE).write_text("\n".join([lines[0], '{"kind": "resu', lines[1]]) + "\n")
    return Path("run")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    def check(code: int, *arguments: str) -> str:
        assert main(["report", *arguments]) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("weldnet: error: ")
        assert err.count("\n") == 1
        return err

    return check


def test_the_command_writes_every_format(run: Path, capsys: pytest.CaptureFixture[str]):
    for name, start in (("r.html", "<!doctype html>"), ("new/r.md", "# weldnet report"), ("r.csv", "origin,")):
        assert main(["report", "run", "-o", name]) == 0
        out, err = capsys.readouterr()
        assert (out, Path(name).read_text().startswith(start)) == ("", True)
        assert "1 line of the records could not be read" in err
        assert f"wrote {name}" in err
    assert "1 line of the records could not be read" in Path("r.html").read_text()
    assert main(["report", "run", "--format", "csv"]) == 0
    assert capsys.readouterr().out == Path("r.csv").read_text()
    assert main(["report", str(run / FILE)]) == 0
    assert capsys.readouterr().out.startswith("# weldnet report")
    assert main(["report", "run", "--json", "--title", "mine"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["title"] == "mine"
    assert [entry["mean"] for entry in document["numbers"]] == [0.2, 0.8]
    assert document["provenance"]["corrupt"] == 1


def test_what_the_command_refuses(run: Path, refused: Refused):
    Path("empty").mkdir()
    Path("empty", FILE).write_text("not json\n")
    assert "missing cannot be read" in refused(1, "missing")
    assert "run/none cannot be read" in refused(1, "run/none")
    assert "there are no records to report; 1 line could not be read" in refused(1, "empty")
    for document, words in (
        ({"rows": [], "method": "gamf", "repair": "none"}, "is the report of one fusion"),
        ({"a": 1}, "is JSON, but not one record a line"),
    ):
        Path("one.json").write_text(json.dumps(document, indent=1))
        assert words in refused(1, "one.json")
    assert "'r.pdf'" in refused(2, "run", "-o", "r.pdf")
    assert "--format 'pdf' is unknown" in refused(2, "run", "--format", "pdf")
    assert "both print on stdout" in refused(2, "run", "--format", "md", "--json")
    assert "is read or written twice" in refused(2, "run", "-o", f"run/{FILE}", "--format", "md")
    assert f"'run/{FILE}/r.html': cannot be written" in refused(1, "run", "-o", f"run/{FILE}/r.html")
    assert "--figure-formats names 'gif'" in refused(2, "run", "--figures", "f", "--figure-formats", "gif")


def test_a_missing_extra_is_named(run: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    err = refused(2, "run", "-o", "r.html")
    assert "needs jinja2 and plotly, which are not installed; pip install 'weldnet[report]'" in err
    assert not Path("r.html").exists()
    assert main(["report", "run", "-o", "r.md"]) == 0  # needs neither


def test_a_missing_exporter_is_named(page: Page, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("weldnet.report._export.find_spec", lambda name: None if name == "kaleido" else object())
    with pytest.raises(UsageError, match=r"needs kaleido, which is not installed; pip install 'kaleido>=1'"):
        export_figures(page, tmp_path)
    with pytest.raises(UsageError, match="cannot be written as 'gif'"):
        export_figures(page, tmp_path, ["gif"])


def test_there_is_no_page_of_nothing():
    with pytest.raises(RecordError, match="there are no records to report; run the study first"):
        build(Records(()))


def test_the_json_document_is_plain_data(page: Page):
    assert json.loads(json.dumps(to_dict(page)))["title"] == page.title
