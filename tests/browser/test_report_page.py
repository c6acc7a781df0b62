"""The report in a real, headless Chromium: it asks for nothing, says nothing, fits, and every plot shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from devtools import Page, browser, find_chromium
from eval_example import example, samples_of
from eval_hostile import hostile, hostile_samples
from llmshrink_eval.report import write_report

pytestmark = pytest.mark.browser

WIDTHS = (1280, 400)
PLOTS = """[...document.querySelectorAll('figure svg')].filter(svg => svg.checkVisibility()).map(svg => {
  const box = svg.getBoundingClientRect();
  const seen = [...svg.querySelectorAll('path, use')].map(path => path.getBoundingClientRect());
  return {width: box.width, height: box.height, marks: seen.filter(b => b.width + b.height > 0).length,
          texts: svg.querySelectorAll('text').length,
          smallest: Math.min(...[...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect().height)),
          outside: [...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect())
            .filter(b => b.left < box.left - 2 || b.right > box.right + 2).length};
})"""
# What sticks out of its parents without a box of its own to scroll in.
OVERFLOWING = """[...document.querySelectorAll('main *')].filter(element =>
  !element.closest('.scroll') && !element.closest('svg') && element.checkVisibility() &&
  element.getBoundingClientRect().right > document.documentElement.clientWidth + 1
).map(element => element.outerHTML.slice(0, 80))"""
# Tables whose columns don't all stand on the screen; that of all layers may scroll.
SCROLLING = """[...document.querySelectorAll('.scroll')].filter(box => box.checkVisibility() &&
  !box.querySelector('table.sticky') && box.scrollWidth > box.clientWidth + 1
).map(box => box.getAttribute('aria-label'))"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    program = find_chromium()
    if program is None:
        pytest.skip("needs Chromium on the path (Debian: apt-get install chromium)")
    with browser(program, tmp_path_factory.mktemp("chromium") / "profile") as opened:
        yield opened


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A rich report, one of hostile texts, and one of a single number."""
    folder = tmp_path_factory.mktemp("reports")
    rich, evil = example(), hostile()
    lone = example(models=0, tasks=0)
    sparse = lone.model_copy(update={"models": (lone.models[0].model_copy(update={"cost": None, "generations": ()}),)})
    write_report(rich, folder / "rich", samples_of(rich))
    write_report(evil, folder / "hostile", hostile_samples(evil))
    write_report(sparse, folder / "sparse", {})
    return {path.name: path / "report.html" for path in folder.iterdir()}


def events(page: Page, method: str) -> list[dict[str, Any]]:
    return [event["params"] for event in page.events if event.get("method") == method]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["rich", "hostile", "sparse"])
def test_the_page_is_quiet_and_fits(page: Page, reports: dict[str, Path], name: str, width: int, dark: bool) -> None:
    address = reports[name].as_uri()
    page.look(width, dark=dark)
    page.open(address)
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OVERFLOWING) == []
    if name != "hostile" or width < 760:  # long names take their room
        assert page.evaluate(SCROLLING) == []
    assert events(page, "Runtime.consoleAPICalled") == []
    assert events(page, "Runtime.exceptionThrown") == []
    assert events(page, "Log.entryAdded") == []
    assert events(page, "Page.javascriptDialogOpening") == []
    asked = {request["request"]["url"] for request in events(page, "Network.requestWillBeSent")}
    assert asked <= {address, "data:,"}
    assert address in asked  # the events do arrive
    assert page.evaluate("document.querySelectorAll('img, script').length") == 0


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_plot_shows_something(page: Page, reports: dict[str, Path], width: int, dark: bool) -> None:
    page.look(width, dark=dark)
    page.open(reports["rich"].as_uri())
    plots = page.evaluate(PLOTS)
    assert len(plots) == page.evaluate("document.querySelectorAll('figure').length") == 4
    for plot in plots:
        assert plot["width"] > 0.75 * min(width, 1100)
        assert plot["height"] > 200
        assert plot["marks"] >= 15
        assert plot["texts"] >= 8
        assert plot["smallest"] >= 11  # CSS pixels: letters that can be read
        assert plot["outside"] == 0


@pytest.mark.parametrize("dark", [False, True])
def test_colours_follow_the_reader_s_scheme(page: Page, reports: dict[str, Path], dark: bool) -> None:
    page.look(1280, dark=dark)
    page.open(reports["rich"].as_uri())
    card = page.evaluate("getComputedStyle(document.querySelector('section')).backgroundColor")
    drawn = page.evaluate("getComputedStyle(document.querySelector('#plot-recovery .wide text')).fill")
    assert (brightness(card) < brightness(drawn)) is dark
    assert abs(brightness(card) - brightness(drawn)) > 300  # of 765


def brightness(colour: str) -> int:
    """Sum of the channels of `rgb(r, g, b)`."""
    return sum(int(channel) for channel in colour.removeprefix("rgb(").removesuffix(")").split(","))


def test_on_a_telephone_every_value_says_what_it_is(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["rich"].as_uri())
    unnamed = """[...document.querySelectorAll('table.stack tbody td')].filter(cell => cell.checkVisibility() &&
      ['none', 'normal', '""'].includes(getComputedStyle(cell, '::before').content)
    ).map(cell => cell.outerHTML)"""
    heads = "[...document.querySelectorAll('table.stack thead')].map(head => head.getBoundingClientRect().height)"
    page.look(400)
    assert page.evaluate("document.querySelectorAll('table.stack').length") == 7
    assert page.evaluate(unnamed) == []
    assert max(page.evaluate(heads)) <= 1
    page.look(1280)
    assert len(page.evaluate(unnamed)) > 50  # in a table the head says it
    assert min(page.evaluate(heads)) > 20


def test_the_checks_would_notice(page: Page, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(
        "<main><figure><svg width=900 height=10></svg></figure><p style='width: 900px'>wide</p></main>"
        "<div class=scroll style='overflow: auto' aria-label=long><p style='width: 900px'>wide</p></div>"
        "<img src='file:///nowhere.png'><script>console.error('no')</script>"
    )
    page.look(400)
    page.open(broken.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") > 400
    assert page.evaluate(OVERFLOWING)
    assert page.evaluate(SCROLLING) == ["long"]
    assert len(events(page, "Runtime.consoleAPICalled")) == 1
    assert "file:///nowhere.png" in {request["request"]["url"] for request in events(page, "Network.requestWillBeSent")}
    assert page.evaluate(PLOTS)[0]["marks"] == 0
