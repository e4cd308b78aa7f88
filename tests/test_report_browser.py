"""The report's page in a browser: offline, at two widths, by day and by night."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from report_records import study
from weldnet.records import Records
from weldnet.report import build, export_figures, to_html

ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
PATIENCE = 45_000  # milliseconds that one wait may take: machines that run tests are busy
LIMIT = 60.0  # seconds that all may take that one test does with a browser


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Kill what this block has started once its time is over: Playwright does not bound every wait, and kaleido few."""
    before, over = set(descendants(os.getpid())), threading.Event()

    def guard() -> None:
        pause = seconds
        while not over.wait(pause):
            pause = 1.0  # again, for what is started later
            kill(set(descendants(os.getpid())) - before)

    thread = threading.Thread(target=guard, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        kill(set(descendants(os.getpid())) - before)


def descendants(process: int) -> list[int]:
    """Return the processes that a process has started, and theirs; none where there is no such file system."""
    found: list[int] = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children = [int(word) for word in path.read_text().split()]
        except OSError:
            continue
        found += [entry for child in children for entry in (child, *descendants(child))]
    return found


def kill(processes: set[int]) -> None:
    for process in processes:
        try:
            os.kill(process, signal.SIGKILL)
        except OSError:
            continue


def missing(reason: str) -> Any:
    """Continuous integration must look at the page; on other machines a browser may be missing."""
    return pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    return found or missing("there is no Chromium; install Debian's chromium")


@pytest.fixture
def browser(chromium: str) -> Iterator[Any]:
    """A browser for one test: Playwright's event loop runs in this thread until it is stopped."""
    playwright = pytest.importorskip("playwright.sync_api")
    with bounded(LIMIT), playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=chromium, args=ARGUMENTS, timeout=PATIENCE)
        yield launched
        if launched.is_connected():
            launched.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A page of every kind of block, but of one setting: drawing is what takes time.
    records = [r for r in study() if r.cell.get("partition") != "iid" or r.kind == "couplings"]
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(to_html(build(Records(tuple(records)))), encoding="utf-8")
    return path


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_the_page_works(browser: Any, file: Path, width: int, scheme: str):
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, color_scheme=scheme)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri(), timeout=PATIENCE)
    page.wait_for_selector(f"html[data-drawn={scheme}]", state="attached")

    # Everything is drawn, nothing sticks out sideways.
    figures = page.locator(".plot")
    assert page.locator(".plot .main-svg").count() >= figures.count() > 10
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width

    # A click on a heading sorts by it, a second one the other way; so does the keyboard.
    table = page.locator("#measurements table").first
    button = table.locator("thead button", has_text="accuracy")
    numbers = "rows => rows.map(row => Number(row.cells[1].dataset.v))"
    button.click()
    down = table.locator("tbody tr").evaluate_all(numbers.replace("1", str(column_of(table, "accuracy"))))
    assert down == sorted(down, reverse=True)
    assert len(set(down)) > 5
    button.focus()
    page.keyboard.press("Enter")
    up = table.locator("tbody tr").evaluate_all(numbers.replace("1", str(column_of(table, "accuracy"))))
    assert up == sorted(down)
    assert table.locator("th[aria-sort=ascending]").count() == 1

    # The switch changes page and figures.
    other = {"light": "dark", "dark": "light"}[scheme]
    before = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()
    page.wait_for_selector(f"html[data-drawn={other}]", state="attached")
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") != before
    tick = page.locator(".plot .xtick text").first.evaluate("text => text.style.fill")
    assert tick == {"light": "rgb(95, 102, 113)", "dark": "rgb(163, 171, 182)"}[other]

    # An entry of a legend hides its series.
    entry = page.locator(".legend button").first
    entry.click()
    assert entry.get_attribute("aria-pressed") == "false"

    assert said == []
    assert asked == [file.as_uri()]
    context.close()


def column_of(table: Any, word: str) -> int:
    headings = table.locator("thead tr:last-child th").all_inner_texts()
    return next(index for index, heading in enumerate(headings) if word in heading)


def test_a_browser_that_hangs_is_killed_in_time(chromium: str):
    playwright = pytest.importorskip("playwright.sync_api")
    with bounded(8.0), playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=chromium, args=ARGUMENTS, timeout=PATIENCE)
        page = launched.new_page()
        with pytest.raises(playwright.Error, match="closed"):
            page.evaluate("() => { for (;;) {} }")
    assert asyncio._get_running_loop() is None


def test_figures_are_written_as_files(chromium: str, tmp_path: Path):
    pytest.importorskip("kaleido")
    records = [record for record in study() if record.kind in ("curve", "couplings")]
    page = build(Records(tuple(records[-1:] + records[:3])))
    assert asyncio._get_running_loop() is None  # no other test's
    with bounded(LIMIT):
        files = export_figures(page, tmp_path / "figures", ["svg", "png"])
    assert len(files) == 2 * len(page.figures) == len(list((tmp_path / "figures").iterdir()))
    for path in files:
        start = path.read_bytes()[:5]
        assert start == (b"\x89PNG\r" if path.suffix == ".png" else b"<svg ")
