"""A real browser on a whole installation: Debian's chromium under Playwright. Skipped loudly where there is none."""
from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.conftest import wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run", "--disable-quic",
]  # fmt: skip
PASSWORD = "a long enough password"
PATIENCE_MS = 60_000
expect.set_options(timeout=PATIENCE_MS)

# Text whose contrast with what lies behind it is below AA: 4.5, or 3 for large letters.
POOR_CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3]));
  const light = (c) => { const [r, g, b] = c.map((v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (element) => { const stack = [];
    for (let e = element; e; e = e.parentElement) stack.push(rgba(getComputedStyle(e).backgroundColor));
    return stack.reverse().reduce((under, top) => over(top, under), [255, 255, 255]); };
  const poor = [];
  for (const element of document.querySelectorAll("#main *")) {
    const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.textContent.trim()).join("");
    const box = element.getBoundingClientRect();
    if (!text || !box.width || !box.height || element.closest("[aria-hidden=true], .material-symbols-outlined, .sq-visually-hidden, [disabled]")) continue;
    const style = getComputedStyle(element);
    const back = behind(element), front = over(rgba(style.color), back);
    const [a, b] = [light(front), light(back)], ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.6 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) poor.push(`${ratio.toFixed(2)} ${text.slice(0, 40)}`);
  }
  return poor;
}"""


@contextmanager
def chromium() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("NO BROWSER: chromium is not installed, so the console is not tested in one")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=2 * PATIENCE_MS)
        yield browser
        browser.close()


class Console:
    """A logged-in tab. `complaints` holds what the browser's console said: errors, and what the content policy stopped."""

    def __init__(self, browser: Browser, url: str, *, width: int = 1440, scheme: Any = "light", password: str = PASSWORD) -> None:
        self.url = url
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.context.set_default_timeout(PATIENCE_MS)
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: None if request.url.startswith((url, "data:")) else self.elsewhere.append(request.url))
        self.go("/admin/login/")
        self.page.fill("[name=username]", "admin")
        self.page.fill("[name=password]", password)
        self.page.click("button[type=submit]")
        self.page.wait_for_url(re.compile(r"/admin/$"))

    def go(self, path: str) -> None:
        self.page.goto(self.url + path)

    def settle(self) -> None:
        """Until what the page fetches by itself is there."""
        # wait_for_function would need the eval that the content policy forbids.
        wait_until(lambda: self.page.evaluate("document.readyState === 'complete' && document.fonts.status === 'loaded' && !document.querySelector('.htmx-request')"))

    def is_too_wide(self) -> bool:
        return bool(self.page.evaluate("document.documentElement.scrollWidth > innerWidth"))
