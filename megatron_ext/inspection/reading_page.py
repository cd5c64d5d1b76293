"""The page to read: texts coloured by fan-out, with every figure's picture below."""

import html
import json
import math
from pathlib import Path
from typing import Any

from megatron_ext.inspection.routed_text import RoutedText
from megatron_ext.reports import html as page

_STYLE = Path(__file__).with_name("page.css")
_SCRIPT = Path(__file__).with_name("page.js")


def reading_page(
    title: str,
    about: str,
    texts: dict[str, RoutedText],
    figures: dict[str, Any],
    pictures: dict[str, tuple[bytes, str]],
) -> str:
    """The page as HTML that needs no other file and fetches nothing.

    Args:
        about: a sentence under the title.
        texts: by name; the tokens of all are coloured on one scale.
        figures: as `figures_of` gives them.
        pictures: PNG and caption by name.
    """
    shown = [
        f'<figure id="{html.escape(name)}">{page.picture(png, caption)}'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for name, (png, caption) in pictures.items()
    ]
    return page.document(
        title,
        [
            f"<h1>{html.escape(title)}</h1>",
            f'<p class="summary">{html.escape(about)}</p>',
            *(_texts(texts) if texts else []),
            "<h2>Domains</h2>",
            f'<div class="wide">{_domains(figures)}</div>',
            *shown,
            _script(texts) if texts else "",
        ],
        _STYLE.read_text(encoding="utf-8"),
        scripts=bool(texts),
    )


def _texts(texts: dict[str, RoutedText]) -> list[str]:
    layers = next(iter(texts.values())).layers
    options = "".join(
        f'<option value="{i}">layer {layer}</option>' for i, layer in enumerate(layers)
    )
    return [
        '<div class="bar"><label>Colour by <select id="layer">'
        f'<option value="mean">mean of the layers</option>{options}</select></label>'
        '<span class="bar">experts a token <span class="scale" id="scale"></span></span>'
        '<button id="theme" type="button" value="auto">Theme: auto</button></div>',
        '<p class="note">Point at a token, or click one and go on with the arrow keys, Page Up and '
        "Page Down, Home and End. In brackets after an expert is the margin: how far the token was "
        "above what it needed.</p>",
        "<noscript>Layers and details need JavaScript; colours are the mean of the layers."
        "</noscript>",
        *(_text(name, text) for name, text in texts.items()),
        '<aside id="details" aria-live="polite" aria-label="the token"></aside>',
    ]


def _text(name: str, text: RoutedText) -> str:
    most = max(1.0, float(text.fan_out.max()))
    spans = "".join(
        f'<span tabindex="-1" style="--f:{fan_out / most:.3f}">{html.escape(token)}</span>'
        for token, fan_out in zip(text.tokens, text.fan_out)
    )
    label = html.escape(name)
    return f'<h2>{label}</h2><div class="text" role="group" aria-label="{label}">{spans}</div>'


def _domains(figures: dict[str, Any]) -> str:
    header = ["domain", "tokens", *(f"fan-out, layer {layer}" for layer in figures["layers"])]
    rows = [
        [name, f"{domain['tokens']:,}", *(f"{value:.2f}" for value in domain["fan_out"])]
        for name, domain in figures["domains"].items()
    ]
    nmi = figures["specialisation"]["nmi"]
    if any(value is not None for value in nmi):
        cells = ["" if value is None else f"{value:.4f}" for value in nmi]
        rows.append(["NMI of domain and expert", "", *cells])
    return page.table(header, rows)


def _script(texts: dict[str, RoutedText]) -> str:
    content = {
        "layers": next(iter(texts.values())).layers,
        "texts": [
            {
                "tokens": text.tokens,
                "losses": [None if math.isnan(loss) else round(loss, 3) for loss in text.losses],
                "routes": [
                    [_route(experts, margins) for experts, margins in zip(*layer)]
                    for layer in zip(text.experts, text.margins)
                ],
            }
            for text in texts.values()
        ],
    }
    encoded = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":  # so that no text can end the script
        encoded = encoded.replace(sign, f"\\u{ord(sign):04x}")
    script = _SCRIPT.read_text(encoding="utf-8")
    return (
        f'<script type="application/json" id="data">{encoded}</script>\n<script>{script}</script>'
    )


def _route(experts: list[int], margins: list[float]) -> list[float | None]:
    """Experts and margins in turn; None for a margin without end."""
    finite = [round(margin, 4) if math.isfinite(margin) else None for margin in margins]
    return [item for pair in zip(experts, finite) for item in pair]
