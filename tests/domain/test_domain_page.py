"""The annotation page in a real browser, by keyboard, served by the command itself. Skipped without Chromium."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from scripted import project

CHROMIUM = Path("/usr/bin/chromium")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
playwright = pytest.importorskip("playwright.sync_api")
# Chromium's own connections to the net would be refused here many at a time, and are none of the page's.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]


class Served:
    """`tunelet domain annotate` in a process of its own, as a user starts it."""

    def __init__(self, target, name):
        line = [sys.executable, "-m", "tunelet", "domain", "annotate", str(target), "--as", name, "--no-browser"]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        self.told = ""
        for text in self.process.stdout:
            self.told += text
            if found := re.search(r"http://127\.0\.0\.1:\d+/\S+/", text):
                self.url = found[0]
                return
        raise AssertionError(self.told)

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        self.told += self.process.communicate(timeout=30)[0]
        assert self.process.returncode == 0, self.told
        return self.told


@pytest.fixture
def serve():
    """serve(target, name) -> Served; none is left behind by a test that fails."""
    made = []

    def start(target, name):
        made.append(Served(target, name))
        return made[-1]

    yield start
    for served in made:
        if served.process.poll() is None:
            served.process.kill()
            served.process.wait()


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.skip("no /usr/bin/chromium")
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield made
        made.close()


@pytest.fixture
def opened(browser, loopback):
    """open(url, width) -> a page that fails the test where it asks another host or reports an error."""
    troubles, pages = [], []

    def make(url, width=1200, lang="en"):
        page = browser.new_page(viewport={"width": width, "height": 800}, locale=lang)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on(
            "request",
            lambda request: request.url.startswith(("http://127.0.0.1", "data:")) or troubles.append(request.url),
        )
        page.on("console", lambda said: said.type == "error" and troubles.append(said.text))
        page.goto(url)
        page.wait_for_selector(".choice")
        pages.append(page)
        return page

    yield make
    for page in pages:
        page.close()
    assert not troubles


def key_of(home, page, number):
    """The digit of the key as it is shown."""
    question = home.questions[number]
    shown = page.locator(".choice > span").all_inner_texts()
    return shown.index(question.choices[question.answer]) + 1


def at(page, number):
    """Waits for item `number` from 0."""
    page.locator("#number", has_text=re.compile(rf"^{number + 1} of|중 {number + 1}번")).wait_for()


def answer(home, page, number, off=0):
    at(page, number)
    page.keyboard.press(str((key_of(home, page, number) - 1 + off) % 4 + 1))
    page.wait_for_selector(".choice.key")


@pytest.mark.slow
@pytest.mark.usefixtures("socket_enabled")
def test_two_annotators_by_keyboard(tmp_path, opened, serve):
    home = project(tmp_path, 8)
    served = serve(home.folder, "mina")
    page = opened(served.url)
    assert page.locator("mark").count() == 0 and page.locator(".choice.key").count() == 0
    answer(home, page, 0)
    assert page.locator("#said").inner_text() == "As the key says."
    assert page.locator("mark").inner_text().split() == home.questions[0].evidence.split()
    page.keyboard.press("j")
    answer(home, page, 1, off=1)
    assert page.locator("#status").inner_text() == "to be resolved"
    page.keyboard.press("a")
    page.wait_for_selector("#status.accepted")
    page.keyboard.press("j")
    answer(home, page, 2)
    page.keyboard.press("e")
    page.locator("#edit-question").fill("A better question, with <b>marks</b> & more?")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#status.edited")
    assert page.locator("#question").inner_text() == "A better question, with <b>marks</b> & more?"
    page.keyboard.press("j")
    at(page, 3)
    page.keyboard.press("x")
    page.keyboard.press("4")
    page.locator("#reject-note").fill("무슨 뜻인지 모르겠음")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#status.rejected")
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("k")
    at(page, 2)
    page.keyboard.press("o")  # the next that is open
    answer(home, page, 4)
    assert page.locator("#progress").inner_text().startswith("5 of 8 done")
    told = served.stop()
    assert "mina: 5 of 8 done, all saved" in told

    served = serve(home.folder, "mina")  # resumes where she stopped
    assert "5 of 8 done" in served.told
    page = opened(served.url)
    for number in range(5, 8):
        answer(home, page, number)
        page.keyboard.press("j")
    assert "All done." in page.locator("#said").inner_text()
    served.stop()

    served = serve(home.folder, "jun")
    page = opened(served.url + "?lang=ko", width=400)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    for number in range(8):
        answer(home, page, number, off=number == 7)
        page.keyboard.press("j")
    assert re.search(r"7개 문항의 일치도 κ 0\.\d\d", page.locator("#progress").inner_text())
    served.stop()

    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    line = [sys.executable, "-m", "tunelet", "domain", "build", str(home.folder), "--json", str(tmp_path / "t.json")]
    subprocess.run(line, check=True, env=env, capture_output=True)
    told = json.loads((tmp_path / "t.json").read_text())
    assert told["agreement"]["answers"]["items"] == 7 and told["agreement"]["answers"]["measure"] == "cohen_kappa"
    assert told["annotators"]["mina"]["edited"] == 1 and told["annotators"]["mina"]["reasons"] == {"unclear": 1}
    rows = [json.loads(text) for text in (home.folder / "dataset" / "v1" / "test.jsonl").open(encoding="utf-8")]
    assert "A better question, with <b>marks</b> & more?" in [row["question"] for row in rows]
    assert told["rows"]["test"] == 6  # 4th: one rejects, one accepts; 8th: one dispute, one accept


@pytest.mark.usefixtures("socket_enabled")
def test_pairs_by_keyboard(tmp_path, opened, serve):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"p{n}", "chosen": "good", "rejected": "bad"}) + "\n" for n in range(3))
    )
    served = serve(path, "mina")
    page = opened(served.url)
    good = page.locator(".choice > span").all_inner_texts().index("good")
    page.keyboard.press(str(good + 1))
    at(page, 1)  # goes on by itself
    page.keyboard.press("k")
    at(page, 0)
    for key in ("j", "3", "1"):  # faster than the server answers: each goes to the item that is shown by then
        page.keyboard.press(key)
    page.locator("#progress", has_text="3 of 3 done").wait_for()
    at(page, 2)
    assert "--out PREFERENCES.jsonl" in served.stop()
    from tunelet.domain import pairs

    rows, figures = pairs.results(path)
    assert rows[0]["chosen"] == "good" and rows[1]["tie"] and figures["judgements"] == 3
