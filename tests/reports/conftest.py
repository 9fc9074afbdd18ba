"""A browser for pages: what it makes of them, and how they lie in windows of several widths."""

import html
import json
import re
import shutil
import subprocess

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SWITCHES = """
--headless --hide-scrollbars --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --virtual-time-budget=3000 --dump-dom --enable-logging=stderr --v=0
"""
MEASURE = """
const found = {};
for (const frame of document.querySelectorAll("iframe")) {
  const page = frame.contentDocument, top = page.documentElement;
  for (const each of page.querySelectorAll("details")) each.open = true;
  const letters = [...page.querySelectorAll(".chart text")].map((text) => text.getBoundingClientRect().height);
  const cut = [...page.querySelectorAll("p, li, h1, h2, h3, h4, summary, figcaption")].filter((part) => {
    const box = part.getBoundingClientRect();
    return box.left < 0 || box.right > frame.clientWidth;
  });
  found[frame.title] = {
    width: frame.contentWindow.innerWidth, scroll: top.scrollWidth, smallest: Math.min(99, ...letters),
    cut: cut.map((part) => part.textContent.slice(0, 60)),
  };
}
document.querySelector("pre").textContent = JSON.stringify(found);
"""


@pytest.fixture
def opened(tmp_path):
    """Open a page; return it as the browser has it after its scripts ran, and what they and it complained of."""
    if BROWSER is None:
        pytest.skip("needs chromium, chromium-browser or google-chrome")

    def open_page(page):
        file = tmp_path / "opened.html"
        file.write_text(page)
        command = [BROWSER, *SWITCHES.split(), f"--user-data-dir={tmp_path / 'profile'}", file.as_uri()]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]

    return open_page


@pytest.fixture
def laid_out(opened):
    """Lay a page out in windows of these widths, everything that opens by a click open; return what is measured."""

    def lay_out(page, widths=(420, 1200)):
        free = html.escape(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page))
        frames = "".join(f'<iframe title="{width}" width="{width}" srcdoc="{free}"></iframe>' for width in widths)
        script = f'addEventListener("load", () => {{ {MEASURE} }})'
        style = "<style>iframe { border: 0 }</style>"
        dom, _ = opened(f"<!DOCTYPE html>{style}{frames}<pre></pre><script>{script}</script>")
        return json.loads(html.unescape(re.search(r"<pre>(.*)</pre>", dom)[1]))

    return lay_out
