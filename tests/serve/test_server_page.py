"""The page, in a browser: it streams, shows figures, asks for keys, and takes text as text."""

from __future__ import annotations

import os
import shutil

import httpx
import pytest
from engines import Scripted, real_engine
from servers import Gated, engine_around, live, wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
sync_api = pytest.importorskip("playwright.sync_api")

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium here: apt-get install chromium"),
]

PHONE, WIDE = {"width": 390, "height": 844}, {"width": 1360, "height": 850}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens the page of a server; what the browser complains of is a failure."""
    complaints = []
    contexts = []

    def open_page(server, size=WIDE, *, expected=()):
        context = browser.new_context(viewport=size)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on(
            "console",
            lambda message: (
                complaints.append(message.text)
                if message.type == "error" and not any(one in message.text for one in expected)
                else None
            ),
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: (
                complaints.append(f"asks {request.url}")
                if not request.url.startswith((server.address, "data:"))
                else None
            ),
        )
        page.goto(server.address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def say(page, text):
    page.locator("#prompt").fill(text)
    page.keyboard.press("Enter")


def test_an_answer_comes_in_parts_and_is_told_of(visit):
    executor = Gated("Hello there, rider.")
    with live(engine_around(executor)) as server:
        page = visit(server)
        page.locator("#model", has_text="tiny").wait_for()
        page.locator("#max_tokens").fill("19")
        say(page, "hi")
        busy = page.locator(".turn.assistant.busy")
        busy.wait_for()
        assert page.locator(".turn.user pre").inner_text() == "hi"
        assert page.locator("#stop").is_visible()
        executor.opened.set()
        told = page.locator(".turn.assistant .told")
        told.wait_for()
        assert page.locator(".turn.assistant pre").inner_text() == "Hello there, rider."
        assert "19 tokens" in told.inner_text()
        assert "first after" in told.inner_text()
        assert page.locator("#send").is_visible()
        say(page, "again")
        page.locator(".turn.assistant .told").nth(1).wait_for()
        assert page.locator(".turn").count() == 4


def test_settings_are_sent_and_a_seed_says_the_same_again(visit):
    with live(real_engine()) as server:
        page = visit(server)
        page.locator("#model", has_text="tiny").wait_for()
        sent = []
        page.on("request", lambda request: sent.append(request.post_data_json))
        page.locator("#temperature").fill("1.5")
        assert page.locator('output[for="temperature"]').inner_text() == "1.5"
        page.locator("#seed").fill("7")
        page.locator("#max_tokens").fill("9")
        page.locator("#system").fill("Be brief.")
        for _ in range(2):
            page.locator("#clear").click()
            say(page, "hi")
            page.locator(".turn.assistant .told").wait_for()
        bodies = [body for body in sent if body]
        assert bodies[0] == bodies[1]
        wanted = {"temperature": 1.5, "top_p": 0.95, "top_k": 0, "seed": 7, "max_tokens": 9}
        assert wanted.items() <= bodies[0].items()
        roles = [message["role"] for message in bodies[0]["messages"]]
        assert roles == ["system", "user"]


def test_live_figures_move(visit):
    executor = Gated(step_s=0.01)
    executor.opened.set()
    with live(engine_around(executor, max_sequences=2)) as server:
        page = visit(server)
        page.locator("#status.good", has_text="ready").wait_for()
        page.locator("#max_tokens").fill("5000")
        say(page, "hi")
        page.locator("#queue output", has_text="1 · 0").wait_for()
        page.wait_for_function("Number(document.querySelector('#speed output').textContent) > 5")
        page.wait_for_function("document.querySelector('#first output').textContent.endsWith('s')")
        page.keyboard.press("Escape")
        page.locator(".told", has_text="stopped").wait_for()
        wait_until(lambda: not server.engine.book)
        page.locator("#queue output", has_text="0 · 0").wait_for()


def test_what_a_model_says_is_text(visit):
    text = "<img src=x onerror=alert(1)><script>document.title='owned'</script>**b**"
    executor = Scripted(text)
    with live(engine_around(executor)) as server:
        page = visit(server)
        page.locator("#model", has_text="tiny").wait_for()
        page.locator("#max_tokens").fill(str(len(text)))
        say(page, text)
        page.locator(".told").wait_for()
        assert page.locator(".turn.assistant pre").inner_text() == text
        assert page.locator(".turn.user pre").inner_text() == text
        assert page.locator(".log img, .log script").count() == 0
        assert "owned" not in page.title()


def test_a_key_is_asked_for_and_kept_in_the_tab(visit):
    with live(real_engine(), keys=["sk-one"]) as server:
        page = visit(server, expected=["401"])
        for key in ("sk-wrong", "sk-one"):
            page.locator("#ask-key[open]").wait_for()
            page.locator("#key").fill(key)
            page.keyboard.press("Enter")
        page.locator("#model", has_text="tiny").wait_for()
        page.locator("#max_tokens").fill("4")
        say(page, "hi")
        page.locator(".told", has_text="4 tokens").wait_for()
        page.reload()
        page.locator("#model", has_text="tiny").wait_for()
        assert not page.locator("#ask-key").is_visible()


def test_a_refusal_is_told_in_words(visit):
    gate = Gated()
    with live(engine_around(gate, max_sequences=1), max_queued_requests=1) as server:
        page = visit(server, expected=["503"])
        page.locator("#model", has_text="tiny").wait_for()
        blocked = visit(server, expected=["503"])
        for one in (page, blocked):
            say(one, "hi")
        wait_until(lambda: len(server.engine.waiting()) == 1)
        third = visit(server, expected=["503"])
        third.locator("#status.bad", has_text="the queue is full").wait_for()
        say(third, "hi")
        third.locator(".told.bad", has_text="too many requests wait; try again in 5 s").wait_for()
        gate.opened.set()
        for one in (page, blocked):
            one.locator(".told", has_text="256 tokens").wait_for()


def test_the_keyboard_is_enough(visit):
    with live(real_engine()) as server:
        page = visit(server)
        page.locator("#model", has_text="tiny").wait_for()
        seen = []
        page.locator("body").press("Tab")
        for _ in range(16):
            seen.append(
                page.evaluate("document.activeElement.id || document.activeElement.tagName")
            )
            page.keyboard.press("Tab")
        wanted = ["clear", "temperature", "top_p", "top_k", "max_tokens", "seed", "system", "log"]
        assert list(dict.fromkeys(one for one in seen if one in wanted)) == wanted
        names = page.evaluate(
            "[...document.querySelectorAll('input, textarea')].filter(one => !one.labels.length)"
            ".map(one => one.id)"
        )
        assert names == []


@pytest.mark.parametrize("size", [PHONE, WIDE], ids=["phone", "wide"])
def test_nothing_is_cut_off_or_wider_than_the_screen(visit, size):
    with live(real_engine()) as server:
        page = visit(server, size)
        page.locator("#model", has_text="tiny").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
        for name in ("#prompt", "#send", "#queue", "#kv", "#speed", "#first", "#clear"):
            box = page.locator(name).bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= size["width"]
            assert box["y"] + box["height"] <= size["height"]


def test_the_page_is_small_and_its_own():
    """Nothing from elsewhere, and little of its own."""
    with live(real_engine()) as server:
        texts = [
            httpx.get(f"{server.address}{path}").text
            for path in ("/", "/page/style.css", "/page/chat.js", "/page/live.js")
        ]
    assert sum(map(len, texts)) < 40_000
    for text in texts:
        assert "http://" not in text
        assert "https://" not in text
        assert "innerHTML" not in text
