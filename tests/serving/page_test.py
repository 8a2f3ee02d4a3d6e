"""The page at / in Chromium: the form, the charts, and nothing from other hosts."""

import re
import shutil

import pytest

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")


@pytest.fixture
def page(url):
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.asked, page.problems = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("console", lambda message: page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto(url)
        playwright.expect(page.locator("#task option")).not_to_have_count(0)
        yield page
        browser.close()
        assert all(asked.startswith(url) for asked in page.asked)


def send(page, task, text, plugin=""):
    page.select_option("#task", task)
    page.select_option("#plugin", plugin)
    page.fill("#text", text)
    page.click("#send")
    playwright.expect(page.locator("#how")).not_to_have_text("waiting", timeout=60_000)
    return page.text_content("#answer"), page.text_content("#how")


def test_a_text_is_answered_and_the_charts_move(page):
    answer, how = send(page, "letter", "x", plugin="ffn_x4")
    assert {line.split()[1] for line in answer.splitlines()} == {"a", "b"}
    assert how.startswith("plugin ffn_x4, ratio 4, ")
    assert send(page, "same", "x\ny")[0].count("\n") == 1
    assert "numbers" in send(page, "embed", "x")[0]
    assert send(page, "relevant", "x\ny\nz")[0].count("\n") == 2
    assert "plugin none, ratio 1" in send(page, "name", "x")[1]
    for chart in ("load", "ratio", "p99"):
        line = page.locator(f"#{chart} polyline")
        playwright.expect(line).to_have_attribute("points", re.compile(r"\S+ \S+ \S+"))
    assert page.text_content("#p99-now").endswith(" ms")
    assert "ready" in page.text_content("#state")
    assert page.problems == []


def test_an_error_is_shown_as_text(page):
    answer, how = send(page, "letter", "<b>x</b>" * 9999)
    assert "truncate" in answer and how == ""
    assert page.locator("#answer b").count() == 0
