"""The page in a real browser."""

from pathlib import Path

import pytest

from tests.analysis.browser import Browser


@pytest.fixture(params=["light", "dark"])
def opened(browser: Browser, written: Path, request: pytest.FixtureRequest) -> Browser:
    browser.open(written, dark=request.param == "dark")
    return browser


def test_nothing_is_fetched_and_nothing_goes_wrong(opened: Browser):
    assert opened.ask("document.title") == "bag_of_tricks – rayltr report"
    assert opened.trouble == []


def test_every_figure_is_drawn(opened: Browser):
    drawn = opened.ask("""[...document.querySelectorAll("figure")].map((f) =>
        [f.id, f.querySelectorAll(".main-svg").length, f.querySelectorAll(".plot path, .plot image, .plot rect").length,
         f.querySelector(".plot").getBoundingClientRect().height])""")
    assert len(drawn) >= 15
    for name, charts, shapes, height in drawn:
        assert charts and shapes > 3 and height > 150, name


def test_text_can_be_read_on_its_paper(opened: Browser):
    """WCAG's contrast of body text, notes, chart labels and warnings: at least 4.5."""
    worst = opened.ask("""(() => {
        const light = (c) => { const v = c.match(/[\\d.]+/g).slice(0, 3).map((x) => {
            x /= 255; return x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4; });
            return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
        const paper = light(getComputedStyle(document.body).backgroundColor);
        const found = {};
        for (const [what, property] of [["p", "color"], ["figcaption", "color"], [".lights span", "color"],
             [".sub", "color"], ["summary", "color"], [".plot .xtick text", "fill"]]) {
            const ink = light(getComputedStyle(document.querySelector(what))[property]);
            found[what] = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
        }
        return found; })()""")
    assert {what: ratio for what, ratio in worst.items() if ratio < 4.5} == {}


def test_tables_sort_by_the_heading_that_is_pressed(browser: Browser, written: Path):
    browser.open(written)
    pressed = """(way, name) => {
        const table = document.querySelector("#table-trials table");
        const head = [...table.querySelectorAll("th")].find((th) => th.textContent === name);
        if (way) { head.querySelector("button").focus(); document.activeElement.click(); }
        return [head.ariaSort, [...table.tBodies[0].rows].map((row) => row.cells[head.cellIndex].textContent)];
    }"""
    _, before = browser.ask(f"({pressed})(0, 'balanced %')")
    way, down = browser.ask(f"({pressed})(1, 'balanced %')")
    numbers = [float(text) for text in down if text != "–"]
    assert way == "descending" and numbers == sorted(numbers, reverse=True) and down[-1] == "–" and down != before
    way, up = browser.ask(f"({pressed})(1, 'balanced %')")
    assert way == "ascending" and [float(text) for text in up if text != "–"] == numbers[::-1] and up[-1] == "–"
    way, names = browser.ask(f"({pressed})(1, 'trial')")
    assert way == "ascending" and names == sorted(names)
    assert browser.ask("document.querySelectorAll('#table-trials [aria-sort]').length") == 1


def test_rows_can_be_filtered(browser: Browser, written: Path):
    browser.open(written)
    shown = browser.ask("""(() => {
        const box = document.querySelector("#table-trials .filter input");
        box.value = "LDAM 0.05"; box.dispatchEvent(new Event("input"));
        const rows = [...document.querySelectorAll("#table-trials tbody tr")];
        return [rows.filter((row) => !row.hidden).map((row) => row.textContent), rows.length,
                document.querySelector("#table-trials output").textContent]; })()""")
    assert 0 < len(shown[0]) < shown[1] and all("ldam" in row for row in shown[0])
    assert shown[2] == f"{len(shown[0])} of {shown[1]}"


@pytest.mark.parametrize("width", [380, 320, 768, 1200])
def test_the_page_never_scrolls_sideways(browser: Browser, written: Path, width: int):
    browser.open(written, width=width)
    browser.ask("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    browser.settled()
    assert browser.ask("document.documentElement.scrollWidth") <= width
    wide = browser.ask(f"""[...document.querySelectorAll("main *")].filter((e) => {{
        const box = e.getBoundingClientRect();
        return !e.closest(".scroll, pre, svg, #figure-recipes .plot") && box.width && box.right > {width + 1};
    }}).map((e) => e.outerHTML.slice(0, 80))""")
    assert wide == []


def test_axis_titles_fit_on_a_phone(browser: Browser, written: Path):
    browser.open(written, width=380)
    cut = browser.ask("""[...document.querySelectorAll(".plot .g-xtitle text, .plot .g-ytitle text")].filter((t) => {
        const own = t.getBoundingClientRect(), box = t.closest(".plot").getBoundingClientRect();
        const across = own.left < box.left - 2 || own.right > box.right + 2;
        return across || own.top < box.top - 2 || own.bottom > box.bottom + 2;
    }).map((t) => t.textContent)""")
    assert cut == []


def test_every_control_can_be_reached_and_has_a_name(browser: Browser, written: Path):
    browser.open(written)
    nameless = browser.ask("""[...document.querySelectorAll("button, summary, a, input, [tabindex='0']")].filter((e) =>
        !(e.textContent.trim() || e.ariaLabel || e.labels?.[0]?.textContent.trim())).map((e) => e.outerHTML)""")
    assert nameless == []
    assert browser.ask("[...document.querySelectorAll('.scroll')].every((e) => e.tabIndex === 0 && e.ariaLabel)")
    levels = browser.ask("[...document.querySelectorAll('h1, h2, h3')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    ids = browser.ask("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(set(ids)) == len(ids)


def test_paper_shows_no_controls_and_every_chart(browser: Browser, written: Path):
    browser.open(written)
    browser.call("Emulation.setEmulatedMedia", media="print")
    shown = browser.ask("""[[...document.querySelectorAll("nav, .copy, .filter, details")].filter((e) =>
        getComputedStyle(e).display !== "none").length, [...document.querySelectorAll(".plot")].filter((e) =>
        e.getBoundingClientRect().height > 300).length]""")
    browser.call("Emulation.setEmulatedMedia", media="")
    assert shown[0] == 0 and shown[1] >= 15


def test_a_click_on_a_recipe_keeps_the_lines_through_that_point(browser: Browser, written: Path):
    browser.open(written)
    faint = """(() => {
        const chart = document.querySelector("#plot-recipes");
        const point = chart.data.find((one) => one.mode === "lines+markers");
        chart.emit("plotly_click", { points: [{ x: 0, y: point.y[0] }] });
        const lines = chart.data.filter((one) => one.mode === "lines+markers");
        return [lines.map((one) => one.opacity ?? 1), lines.map((one) => one.y[0] === point.y[0])]; })()"""
    opacity, through = browser.ask(faint)
    assert [value == 1 for value in opacity] == through and 0 < sum(through) < len(through)
    opacity, _ = browser.ask(faint)
    assert set(opacity) == {1}, "the same point again lets go"
