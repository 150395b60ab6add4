"""The page at /, in a browser without a window: by keyboard, and on a phone's width."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ldmq_kernels as ldmq
from ldmq_kernels.serving.app import make_app
from python_tests.serving.browser import CHROMIUM, Browser
from python_tests.serving.served import Server, settings_of
from python_tests.tiny import SHALLOW, tiny_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium on this machine")]
PHONE = 360


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("browser")
    pipes: dict[str, Any] = {
        "quantized": ldmq.quantize(tiny_pipeline(folder / "a", **SHALLOW), scheme="w8a8-dynamic"),
        "float": tiny_pipeline(folder / "b", **SHALLOW),
    }
    settings = settings_of("quantized", "float", guidance=4.0, steps=4)
    with Server(make_app(settings, lambda *_: pipes)) as url:
        browser = Browser(folder / "profile")
        browser.call("Emulation.setDeviceMetricsOverride", width=PHONE, height=740, deviceScaleFactor=1, mobile=True)
        browser.call("Page.enable")
        browser.call("Page.navigate", url=url)
        wait(browser, "document.querySelectorAll('figure').length == 2")
        yield browser
        browser.close()


def wait(browser: Browser, condition: str) -> None:
    for _ in range(600):
        if browser.value(condition):
            return
        time.sleep(0.05)
    raise AssertionError(f"{condition} never held: {browser.value('document.body.innerText')}")


def test_a_prompt_typed_and_sent_by_keyboard_is_drawn_by_both_models(browser: Browser, tmp_path: Path) -> None:
    assert browser.value("document.activeElement.id") == "prompt"
    browser.value(
        "window.seen = {}; new MutationObserver(all => all.forEach(m => { const id = m.target.parentElement.id;"
        "(seen[id] ??= new Set()).add(m.target.src) }))"
        ".observe(document.getElementById('pictures'), { subtree: true, attributeFilter: ['src'] })"
    )
    browser.call("Input.insertText", text="a red circle")
    browser.press("Enter", "Enter", 13, "\r", modifiers=2)
    wait(browser, "document.getElementById('status').textContent != '' && !document.getElementById('draw').disabled")
    assert browser.value("document.getElementById('status').textContent") == "done"
    first, second = browser.value("[...document.querySelectorAll('figcaption')].map(text => text.textContent)")
    assert first.startswith("float · float, 16 bit ·")
    assert second.startswith("quantized · quantized ·")
    assert " MB · " in first
    assert " s" in first
    assert "PSNR" in second
    assert "dB" in second
    assert browser.value("seen['of-float'].size") > 1, "it appeared at once"
    assert browser.value("[...document.images].every(img => img.naturalWidth == 16 && img.alt == 'a red circle')")


def test_nothing_is_wider_than_a_phone(browser: Browser) -> None:
    assert browser.value("document.documentElement.scrollWidth") <= PHONE
    assert browser.value("[...document.images].every(img => img.getBoundingClientRect().right <= innerWidth)")


def test_every_field_is_reached_by_tab_and_named(browser: Browser) -> None:
    browser.value("document.getElementById('prompt').focus()")
    reached = []
    for _ in range(4):
        browser.press("Tab", "Tab", 9)
        reached.append(browser.value("document.activeElement.id"))
    assert reached == ["seed", "steps", "key", "draw"]
    assert browser.value("[...document.querySelectorAll('input, textarea')].every(field => field.labels.length == 1)")


def test_an_error_is_said_where_readers_of_the_screen_hear_it(browser: Browser) -> None:
    browser.value("document.getElementById('steps').value = 5000; document.getElementById('form').requestSubmit()")
    wait(browser, "document.getElementById('status').textContent.includes('num_inference_steps')")
    assert browser.value("document.getElementById('status').getAttribute('role')") == "status"
