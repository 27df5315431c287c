"""The gateway's page in a real browser, before a real Triton: what a person sees, does and hears."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from nemobuild.convert.executor import convert
from nemobuild.gateway.keys import make_key
from nemobuild.gateway.process import GatewayProcess, listening, url_of
from nemobuild.model.hf_config import load_json
from nemobuild.triton.repository import plan_repository, write_repository
from nemobuild.weights.snapshot import open_snapshot
from tests import templates
from tests.gateway_road import served
from tests.plans import planned
from tests.scripted import CLOSED, write_scripted

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.xdist_group("triton"),
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on PATH"),
]

THOUGHT = "Der Wetterdienst weiß es. ลองคิดดู 🤔"
ANSWER = 'Grüße, नमस्ते 👩‍👩‍👧‍👦 <img src=x onerror="document.title=1"> fertig.'
CALLS = '[{"name": "get_weather", "arguments": {"city": "Zürich"}}, {"name": "now", "arguments": {}}]'
LOOP = "round and round, "
TOOLS = json.dumps([{"type": "function", "function": {"name": name}} for name in ("get_weather", "now")])
SCRIPTS = {"\n": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}<TOOLCALL>{CALLS}</TOOLCALL>", CLOSED: LOOP}


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    template = templates.SUPER_V15.replace("tool_notes", "''")
    source = write_scripted(folder / "hf", SCRIPTS, template, loops=(CLOSED,))
    checkpoint = convert(open_snapshot(source), folder / "checkpoint").output
    plan = planned(
        config=load_json(source / "config.json"),
        limits={
            "max_batch_size": 4,
            "max_context_tokens": 100_000,
            "default_max_tokens": 90_000,  # more than a test waits for
            "kv_cache_tokens": 400_000,
        },
        reasoning={"policy": "nemotron-super-v1.5", "default": "on"},
    )
    repository = write_repository(plan_repository(plan, source, checkpoint), folder / "repository")
    with served(repository, folder) as road:
        yield road


@pytest.fixture(scope="module")
def chromium():
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, road):
    with opened(chromium, road.url) as page:
        yield page


@contextlib.contextmanager
def opened(chromium, url, **options):
    """The page, ready to talk. What it asks of another host, and what its script fails at, fail the test."""
    context = chromium.new_context(**options)
    context.set_default_timeout(30_000)
    page, troubles = context.new_page(), []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda m: troubles.append(m.text) if "Security Policy" in m.text else None)
    page.on("request", lambda r: troubles.append(r.url) if not r.url.startswith((url, "data:")) else None)
    page.goto(f"{url}/")
    page.wait_for_function("() => document.title != 'nemobuild' || document.querySelector('[role=alert]')")
    yield page
    assert not troubles
    context.close()


def say(page, text="Hi", *, wait=True):
    """Send ``text`` with the keyboard; the body of the request."""
    page.get_by_role("textbox", name="Message", exact=True).fill(text)
    with page.expect_request("**/chat/completions") as sent:
        page.keyboard.press("Enter")
    if wait:
        page.wait_for_selector("#log[aria-busy=false]")
    return sent.value.post_data_json


def set_tools(page, text=TOOLS):
    page.get_by_text("More settings").click()
    page.get_by_label("Tools").fill(text)


def test_reasoning_is_folded_and_the_answer_and_its_numbers_are_shown(page):
    assert say(page) == {
        "model": page.title(),
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "Hi"}],
    }
    assert page.evaluate("document.activeElement.id") == "prompt"  # ready for the next question
    summary = page.get_by_text(re.compile(r"^Thought for \d+ tokens$"))
    assert summary.is_visible() and not page.get_by_text(THOUGHT).is_visible()
    summary.click()
    assert page.get_by_text(THOUGHT).is_visible()
    shown = page.locator(".answer").inner_text()
    assert shown.startswith(ANSWER) and page.locator("img").count() == 0  # markup of the model stays text
    numbers = page.locator(".stats").inner_text()
    assert re.fullmatch(r"first token \d+ ms · [\d.]+ tokens/s · \d+ tokens, \d+ of them thought", numbers)


def test_the_numbers_move_while_the_answer_comes(page):
    page.get_by_label("Reasoning").select_option("off")
    say(page, wait=False)
    live = re.compile(r"first token \d+ ms · about [\d.]+ tokens/s · about \d+ tokens")
    playwright.expect(page.locator(".stats")).to_have_text(live, timeout=30_000)
    before = page.locator(".stats").inner_text()
    assert "about" in before  # the page can be asked while it is written to
    playwright.expect(page.locator(".stats")).not_to_have_text(before, timeout=30_000)
    page.keyboard.press("Escape")
    page.wait_for_selector("#log[aria-busy=false]")


def test_a_reader_who_scrolled_up_stays_there(page):
    page.get_by_label("Reasoning").select_option("off")
    say(page, wait=False)
    page.wait_for_function("() => document.getElementById('scroll').scrollTop > 100")  # it follows the end
    page.locator("#scroll").hover()
    while page.evaluate("document.getElementById('scroll').scrollTop"):
        page.mouse.wheel(0, -2000)
    length = len(page.locator(".answer").text_content())
    page.wait_for_function("(n) => document.querySelector('.answer').textContent.length > n + 500", arg=length)
    assert page.evaluate("document.getElementById('scroll').scrollTop") == 0
    page.keyboard.press("Escape")


def test_a_question_that_was_refused_comes_back_and_is_not_asked_again(page):
    page.get_by_text("More settings").click()
    page.get_by_label("Tokens at most").fill("9999999")
    say(page, "the first")
    assert "max_completion_tokens" in page.get_by_role("alert").inner_text()
    assert page.get_by_role("textbox", name="Message", exact=True).input_value() == "the first"
    page.get_by_label("Tokens at most").fill("")
    assert [m["content"] for m in say(page, "the second")["messages"]] == ["the second"]
    assert page.locator(".answer").inner_text().startswith(ANSWER)


def test_the_focus_stays_where_the_reader_put_it(page):
    page.get_by_role("textbox", name="Message", exact=True).fill("Hi")
    page.evaluate("document.getElementById('form').requestSubmit(); document.getElementById('mode').focus()")
    page.wait_for_selector(".answer")
    page.wait_for_selector("#log[aria-busy=false]")
    assert page.evaluate("document.activeElement.id") == "mode"


@pytest.mark.parametrize("how", ["button", "escape"])
def test_an_answer_is_stopped_and_the_conversation_goes_on(page, how):
    page.get_by_label("Reasoning").select_option("off")
    say(page, wait=False)
    page.wait_for_selector(".answer")
    stop = page.get_by_role("button", name="Stop")
    stop.click(force=True) if how == "button" else page.keyboard.press("Escape")
    page.wait_for_selector("#log[aria-busy=false]")
    text = page.locator(".answer").inner_text()
    assert LOOP.strip().startswith(text[:5]) and stop.is_disabled()
    assert "stopped" in page.locator(".stats").inner_text()
    page.get_by_label("Reasoning").select_option("on")
    asked = say(page, "And now?")
    assert [m["role"] for m in asked["messages"]] == ["user", "assistant", "user"]
    assert asked["messages"][1]["content"].strip() == text.strip()
    assert page.get_by_role("alert").all_inner_texts() == []
    assert page.locator(".answer").nth(1).inner_text().startswith(ANSWER)


def test_the_settings_reach_the_request(page):
    page.get_by_label("Thinking budget").fill("7")
    page.get_by_text("More settings").click()
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Tokens at most").fill("90")
    page.get_by_label("System message").fill("Be brief.")
    asked = say(page)
    assert asked["reasoning"] == {"max_tokens": 7}
    assert (asked["temperature"], asked["max_completion_tokens"]) == (0.5, 90)
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    page.get_by_label("Thinking budget").fill("")
    page.get_by_label("Reasoning").select_option("on")
    assert say(page)["reasoning"] == {"enabled": True}
    page.get_by_label("Thinking budget").fill("7")
    page.get_by_label("Reasoning").select_option("off")
    assert page.get_by_label("Thinking budget").is_disabled()
    assert say(page)["reasoning"] == {"enabled": False}
    assert "cut at the limit" in page.locator(".stats").last.inner_text()


def test_tool_calls_are_cards_and_their_results_go_back(page):
    set_tools(page)
    say(page)
    cards = page.get_by_role("region")
    assert cards.count() == 2 and page.locator(".answer").inner_text().rstrip() == ANSWER
    assert cards.nth(0).inner_text() == 'Calls get_weather\n{\n  "city": "Zürich"\n}'
    page.get_by_label("Result of get_weather").fill('{"sky": "blue"}')
    page.get_by_label("Result of now").fill("12:00")
    with page.expect_request("**/chat/completions") as sent:
        page.get_by_role("button", name="Give results").click()
    _, assistant, first, second = sent.value.post_data_json["messages"]
    names = [call["function"]["name"] for call in assistant["tool_calls"]]
    assert names == ["get_weather", "now"]
    assert json.loads(assistant["tool_calls"][0]["function"]["arguments"]) == {"city": "Zürich"}
    assert (first["role"], first["content"], second["content"]) == ("tool", '{"sky": "blue"}', "12:00")
    assert first["tool_call_id"] == assistant["tool_calls"][0]["id"] != second["tool_call_id"]
    page.wait_for_selector("#log[aria-busy=false]")
    assert page.get_by_role("alert").count() == 0 and page.locator(".answer").count() == 2


def test_what_is_refused_is_said_with_the_field(page):
    page.get_by_text("More settings").click()
    page.get_by_label("Tokens at most").fill("99999")
    say(page)
    assert "400: max_completion_tokens" in page.get_by_role("alert").inner_text()
    page.get_by_label("Tokens at most").fill("")
    page.get_by_label("Tools").fill("[{]")
    page.get_by_role("textbox", name="Message", exact=True).fill("x")
    page.get_by_role("button", name="Send").click()
    assert page.get_by_role("alert").last.inner_text().startswith("Tools: ")
    page.get_by_label("Tools").fill("")
    page.get_by_label("Thinking budget").fill("-1")
    page.get_by_role("textbox", name="Message", exact=True).fill("x")
    page.get_by_role("button", name="Send").click()
    assert page.get_by_role("alert").last.inner_text().startswith("Thinking budget: ")


def test_a_key_is_asked_for_and_a_server_that_left_is_named(chromium, road, tmp_path):
    key = make_key(tmp_path / "keys", "tester")
    assets = Path(road.gateway_log).with_name("repository") / "chat" / "1" / "assets"
    with listening("127.0.0.1", 0, tmp_path / "keys") as bound:
        gateway = GatewayProcess(bound, road.triton, assets, tmp_path / "keys", tmp_path / "log")
        try:
            with opened(chromium, url_of(bound)) as page:
                assert "401" in page.get_by_role("alert").inner_text()
                assert page.evaluate("document.activeElement.id") == "key"
                page.keyboard.type(key)
                page.keyboard.press("Tab")
                page.wait_for_function("() => document.title != 'nemobuild'")
                say(page)
                assert page.locator(".answer").inner_text().startswith(ANSWER)
                gateway.stop()
                bound.close()
                say(page)
                assert "cannot be reached" in page.get_by_role("alert").last.inner_text()
        finally:
            gateway.stop()


def test_it_is_used_without_a_mouse(page):
    box = page.get_by_role("textbox", name="Message", exact=True)
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert box.input_value() == "one\ntwo"
    assert say(page, "one\ntwo")["messages"][0]["content"] == "one\ntwo"
    reached = set()
    page.evaluate("document.activeElement.blur()")
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    thought = next(name for name in reached if name.startswith("Thought"))
    assert reached >= {"fresh", thought, "mode", "budget", "More settings", "prompt", "send"}


def test_a_screen_reader_hears_names_and_what_happens(page):
    page.evaluate(
        """() => { const status = document.getElementById("status"); window.heard = [];
        new MutationObserver(() => heard.push(status.textContent)).observe(status, {childList: true}) }"""
    )
    set_tools(page)
    say(page)
    heard = page.evaluate("heard")
    assert heard[-1].startswith(ANSWER)
    assert set(heard[:-1]) <= {"Thinking.", "Answering."} and heard[:-1]  # a busy machine brings both at once
    assert "Calls get_weather." in heard[-1] and " tokens" in heard[-1]
    for control in page.locator("input, select, textarea, button").all():
        assert control.evaluate("e => e.labels?.length ? e.labels[0].textContent.trim() : e.textContent.trim()")
    tree = page.locator("body").aria_snapshot()
    for part in ('heading "Conversation"', "log", "status", 'region "Tool call get_weather"', 'combobox "Reasoning"'):
        assert part in tree
    assert page.evaluate("document.documentElement.lang") == "en"


CONTRASTS = """() => {
  const light = (c) => { const [r, g, b] = c.map((v) => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b };
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const below = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c.slice(0, 3) } };
  return [...document.querySelectorAll("body *")].filter((e) => !e.disabled && e.checkVisibility() &&
    [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) && !e.closest("script, style, select"))
    .map((e) => { const [a, b] = [parse(getComputedStyle(e).color).slice(0, 3), below(e)].map(light);
      return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.className || e.tagName] });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844), (320, 568)])
def test_it_fits_and_reads_well(chromium, road, scheme, width, height):
    size = {"width": width, "height": height}
    with opened(chromium, road.url, color_scheme=scheme, viewport=size) as page:
        page.get_by_text("More settings").click()
        page.get_by_label("Tools").fill(TOOLS)
        page.get_by_label("Tokens at most").fill("99999")
        say(page, "a-very-long-word-" * 30)
        page.get_by_label("Tokens at most").fill("")
        say(page)
        page.get_by_text("Thought for").click()
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate("document.documentElement.scrollHeight") == height  # the composer is always in sight
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 12 and min(contrasts)[0] >= 4.5, min(contrasts)
        dark = page.evaluate("parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])") < 128
        assert dark == (scheme == "dark")
        for button in page.locator("button, input, select").all():
            assert button.evaluate("e => !e.checkVisibility() || e.getBoundingClientRect().height >= 44")
        thought, answer = page.locator(".thought").bounding_box(), page.locator(".answer").bounding_box()
        beside = thought["x"] + thought["width"] <= answer["x"]
        assert beside == (width > 900) and (beside or thought["y"] + thought["height"] <= answer["y"])
