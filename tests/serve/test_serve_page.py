"""The chat page in a real browser, by keyboard and by mouse. Skipped without Chromium."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from serving import ScriptedEngine, app_of, running, until

CHROMIUM = Path("/usr/bin/chromium")
pytest.importorskip("uvicorn")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.skipif(not CHROMIUM.exists(), reason="no Chromium here"),
    pytest.mark.usefixtures("loopback"),
]
# Chromium's own connections to the net would be refused here many at a time, and are none of the page's.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
PICTURES = os.environ.get("TUNELET_PICTURES")  # a folder for screenshots


@pytest.fixture
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


def open_page(browser, url, lang="en", **options):
    context = browser.new_context(locale=lang, **options)
    page = context.new_page()
    page.problems = []
    page.on("console", lambda told: page.problems.append(told.text) if told.type == "error" else None)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.set_default_timeout(15_000)
    page.goto(url)
    return page


def wait(page, what):
    """Playwright's own way makes code of a string in the page, which the page forbids."""
    until(lambda: page.evaluate(what), 15)


def shot(page, name):
    if PICTURES:
        page.screenshot(path=f"{PICTURES}/{name}.png")


def test_a_conversation_by_keyboard(browser, tiny_tokenizer):
    engine = ScriptedEngine(tiny_tokenizer, "The kitchen light is on.\n<b>Not bold</b>")
    with running(app_of(engine, names=("home", "other"))) as (_, url, _):
        page = open_page(browser, url)
        wait(page, "document.querySelectorAll('#model option').length == 2")
        shot(page, "empty")
        page.keyboard.type("Turn on the light")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("in the kitchen")
        page.keyboard.press("Enter")
        answer = page.locator(".turn.assistant .said")
        page.wait_for_selector(".turn.assistant .foot button")
        assert answer.inner_text() == "The kitchen light is on.\n<b>Not bold</b>"
        assert " tokens, " in page.locator(".turn.assistant .note").inner_text()
        page.keyboard.type("And now?")
        page.keyboard.press("Enter")
        until(lambda: len(engine.asked) == 2)
        text = tiny_tokenizer.decode(engine.asked[1].request.prompt)
        assert "user\nTurn on the light\nin the kitchen<|im_end|>" in text and "assistant\nThe kitchen light" in text
        wait(page, "document.querySelectorAll('.turn.assistant .foot button').length == 2")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("System message").fill("Be brief.")
        page.get_by_label("Longest answer").fill("7")
        page.get_by_label("Temperature").fill("0.5")
        page.locator("#model").select_option("other")
        shot(page, "settings")
        page.get_by_role("button", name="New chat").click()
        assert page.locator(".turn").count() == 0
        page.keyboard.type("Hi")
        page.get_by_role("button", name="Send").click()
        until(lambda: len(engine.asked) == 3)
        request = engine.asked[2].request
        assert request.max_new_tokens == 7 and request.sampling.temperature == 0.5
        assert tiny_tokenizer.decode(request.prompt).startswith(
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi"
        )
        wait(page, "document.querySelector('.turn.assistant .note').textContent.includes('cut off')")
        assert page.problems == []


def test_an_answer_can_be_stopped_and_copied(browser, tiny_tokenizer):
    engine = ScriptedEngine(tiny_tokenizer, by_hand=True)
    with running(app_of(engine)) as (_, url, _):
        page = open_page(browser, url, permissions=["clipboard-read", "clipboard-write"])
        wait(page, "document.querySelectorAll('#model option').length == 1")
        for number, stop in enumerate(("Escape", "button")):
            page.keyboard.type("Hi")
            page.keyboard.press("Enter")
            until(lambda number=number: len(engine.asked) > number)
            under = engine.asked[number]
            for token in tiny_tokenizer("on and on")["input_ids"]:
                under.give(token)
            wait(page, f"document.querySelectorAll('.turn.assistant .said')[{number}].textContent == 'on and on'")
            if stop == "Escape":
                page.keyboard.press("Escape")
            else:
                page.get_by_role("button", name="Stop").click()
            assert under.cancelled.wait(1)
            wait(page, f"document.querySelectorAll('.turn.assistant .note')[{number}].textContent == 'stopped'")
        page.get_by_role("button", name="Copy").first.click()
        assert page.evaluate("navigator.clipboard.readText()") == "on and on"
        assert page.problems == []


def test_the_key_is_asked_for_and_kept_for_the_tab(browser, tiny_tokenizer):
    engine = ScriptedEngine(tiny_tokenizer)
    with running(app_of(engine, key="k3y")) as (_, url, _):
        page = open_page(browser, url, "ko-KR", viewport={"width": 360, "height": 640}, color_scheme="dark")
        page.wait_for_selector("dialog[open]")
        shot(page, "key")
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-wrong:not([hidden])")
        page.keyboard.type("k3y")
        page.keyboard.press("Enter")
        wait(page, "document.querySelectorAll('#model option').length == 1")
        page.keyboard.type("안녕하세요")
        page.keyboard.press("Enter")
        page.wait_for_selector(".turn.assistant .foot button")
        shot(page, "korean")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.reload()
        wait(page, "document.querySelectorAll('#model option').length == 1")
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        assert all("401" in problem for problem in page.problems)


def test_what_goes_wrong_is_said(browser, tiny_tokenizer):
    engine = ScriptedEngine(tiny_tokenizer, by_hand=True, slots=1)
    app = app_of(engine, queue=0)
    with running(app) as (_, url, _):
        page, other = open_page(browser, url), open_page(browser, url)
        for one in (page, other):
            wait(one, "document.querySelectorAll('#model option').length == 1")
        other.keyboard.type("first")
        other.keyboard.press("Enter")
        until(lambda: engine.asked)
        page.keyboard.type("second")
        page.keyboard.press("Enter")
        wait(page, "document.querySelector('.turn.bad .note')?.textContent.startsWith('The server is busy')")
        engine.asked[0].end()
        page.get_by_role("button", name="Try again").click()
        until(lambda: len(engine.asked) == 2)
        engine.asked[1].give(5)
        engine.asked[1].end("error", "boom")
        wait(page, "document.querySelector('.turn.bad .note')?.textContent.includes('The engine failed')")
