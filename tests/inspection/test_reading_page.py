"""Tests of the page of tools.inspect_routing in a browser: colors, layers, keys, escaping."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from megatron_ext.inspection.reading_page import reading_page
from megatron_ext.inspection.routed_text import RoutedText

# What a text may hold: markup, an end of the script, attributes, letters of two code units.
TOKENS = ["<script>attacked=1</script>", "</span>", ' "onmouseover=', "&amp;"]
TOKENS += ["\n", "", " 🙂", "\u2028"]
EXPERTS = [[[], [0], [1, 2], [0, 1, 2, 3], [3], [], [0], []], [[1]] * 7 + [[]]]
MARGINS = [[[0.25 + expert for expert in chosen] for chosen in layer] for layer in EXPERTS]
LOSSES = [float("nan"), 1.5, 2.25, 0.0, 3.0, 0.5, 7.125, 1.0]
TEXT = RoutedText(TOKENS, [1, 3], EXPERTS, MARGINS, LOSSES)
FIGURES = {
    "layers": [1, 3],
    "domains": {"a <b>": {"tokens": 8, "fan_out": [9 / 8, 7 / 8]}},
    "specialisation": {"nmi": [None, None]},
}


def make_page() -> str:
    return reading_page("A <b> page", "about & more", {"one <i>": TEXT, "two": TEXT}, FIGURES, {})


def test_reading_page_escapes_text() -> None:
    page = make_page()
    assert page.count("<script") == 2  # the data and ours
    body = page[page.index("<body>") : page.index('<script type="application/json"')]
    for hostile in ("<script>attacked", "<b>", "<i>", ' "onmouseover='):
        assert hostile not in body
    assert body.count("<span") == body.count("</span>")
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert data and not set("<>&\u2028") & set(data[1])
    assert json.loads(data[1])["texts"][0]["tokens"] == TOKENS
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)


DRIVER = """<script>
const out = {}, all = [...document.querySelectorAll(".text span")];
const shades = () => all.slice(0, 8).map((span) => Number(span.style.getPropertyValue("--f")));
const pick = (value) => { picker.value = value; picker.dispatchEvent(new Event("change")); };
const press = (key) => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true }));
out.attacked = typeof attacked;
out.texts = all.slice(0, 8).map((span) => span.textContent);
out.options = [...picker.options].map((option) => option.textContent);
out.mean = shades();
pick("0"); out.first = shades(); out.scale = document.getElementById("scale").textContent;
pick("1"); out.second = shades();
all[3].dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
out.hovered = details.innerText;
all[2].focus();  // a headless window may not have the focus yet, and then sends no event
if (!document.hasFocus()) all[2].dispatchEvent(new FocusEvent("focusin", { bubbles: true }));
out.focused = details.innerText;
press("ArrowRight"); out.right = all.indexOf(document.activeElement);
press("End"); out.end = all.indexOf(document.activeElement); press("ArrowRight");
press("Home"); press("ArrowLeft"); out.home = all.indexOf(document.activeElement);
out.stops = all.filter((span) => span.tabIndex === 0).length;
const scheme = () => getComputedStyle(document.body).backgroundColor;
button.click(); out.light = scheme(); button.click(); out.dark = scheme();
out.theme = button.textContent;
const shown = document.createElement("pre");
shown.id = "result"; shown.textContent = JSON.stringify(out); document.body.append(shown);
</script>"""


def chromium(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    if (browser := shutil.which("chromium")) is None:
        pytest.skip("chromium is not installed: make system-deps")
    return subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--enable-logging=stderr", f"--user-data-dir={page.parent / 'profile'}"),
            *("--window-size=900,700", *flags, page.as_uri()),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )


def test_reading_page_interaction_in_a_browser(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(make_page().replace("</body>", DRIVER + "</body>"), encoding="utf-8")
    done = chromium(page, "--dump-dom")
    assert "CONSOLE" not in done.stderr
    result = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert result, done.stdout[-2000:]
    out = json.loads(html.unescape(result[1]))
    assert out["attacked"] == "undefined" and out["texts"] == TOKENS
    assert out["options"] == ["mean of the layers", "layer 1", "layer 3"]
    fan_out = np.array([[len(chosen) for chosen in layer] for layer in EXPERTS])
    mean = fan_out.mean(axis=0)
    assert out["mean"] == pytest.approx(mean / mean.max(), abs=1e-3)
    assert out["first"] == pytest.approx(fan_out[0] / 4, abs=1e-3)  # the layers' common scale
    assert out["second"] == pytest.approx(fan_out[1] / 4, abs=1e-3)
    assert out["scale"] == "01234"
    for text in ("token 4 of 8", "0.00 nats", "3.00 nats", "expert 2 (+2.250)", "layer 3"):
        assert text in out["hovered"]
    assert "token 3 of 8" in out["focused"] and "expert 1 (+1.250)" in out["focused"]
    assert (out["right"], out["end"], out["home"], out["stops"]) == (3, 15, 0, 1)
    assert out["light"] == "rgb(255, 255, 255)" and out["dark"] == "rgb(22, 24, 27)"
    assert out["theme"] == "Theme: dark"


@pytest.mark.parametrize("scheme, dark", [("0", True), ("1", False)], ids=["dark", "light"])
def test_reading_page_follows_the_theme_of_the_browser(
    tmp_path: Path, scheme: str, dark: bool
) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "shot.png"
    page.write_text(make_page(), encoding="utf-8")
    chromium(page, f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}")
    brightness = matplotlib.image.imread(picture)[..., :3].mean(axis=-1)
    background = float(np.median(brightness))
    assert background < 0.15 if dark else background > 0.95
    assert (np.abs(brightness - background) > 0.5).mean() > 0.005  # letters
