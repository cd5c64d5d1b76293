"""Page of texts whose tokens are colored by fan-out, with all pictures."""

import math
from pathlib import Path
from typing import Any

from markupsafe import Markup

from megatron_ext.inspection.routed_text import RoutedText
from megatron_ext.reports.html import render, script_json

_STYLE = Path(__file__).with_name("page.css")
_SCRIPT = Path(__file__).with_name("page.js")
_TEMPLATE = Path(__file__).with_name("templates") / "reading_page.html"


def reading_page(
    title: str,
    about: str,
    texts: dict[str, RoutedText],
    statistics: dict[str, Any],
    pictures: dict[str, tuple[bytes, str]],
) -> str:
    """Return a page that needs no other file and fetches nothing.

    Args:
        title: Title of the page.
        about: Sentence under the title.
        texts: Texts by name. The tokens of all are colored on one scale.
        statistics: Statistics that `routing_statistics` returns.
        pictures: PNG and caption by name.
    """
    header, domains = _domains(statistics)
    return render(
        _TEMPLATE,
        title=title,
        about=about,
        style=Markup(_STYLE.read_text(encoding="utf-8")),
        layers=next(iter(texts.values())).layers if texts else [],
        texts=[(name, _tokens(text)) for name, text in texts.items()],
        header=header,
        domains=domains,
        pictures=[(name, png, caption) for name, (png, caption) in pictures.items()],
        data=_script_data(texts) if texts else "",
        script=Markup(_SCRIPT.read_text(encoding="utf-8")),
    )


def _tokens(text: RoutedText) -> list[tuple[str, float]]:
    """Return each token with its fan-out as a share of the largest."""
    largest = max(1.0, float(text.fan_out.max()))
    return [(token, fan_out / largest) for token, fan_out in zip(text.tokens, text.fan_out)]


def _domains(statistics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of domains."""
    header = ["domain", "tokens", *(f"fan-out, layer {layer}" for layer in statistics["layers"])]
    rows = [
        [name, f"{domain['tokens']:,}", *(f"{value:.2f}" for value in domain["fan_out"])]
        for name, domain in statistics["domains"].items()
    ]
    nmi = statistics["specialisation"]["nmi"]
    if any(value is not None for value in nmi):
        cells = ["" if value is None else f"{value:.4f}" for value in nmi]
        rows.append(["NMI of domain and expert", "", *cells])
    return header, rows


def _script_data(texts: dict[str, RoutedText]) -> Markup:
    """Return the texts and routes as JSON in which no text can end the script."""
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
    return script_json(content)


def _route(experts: list[int], margins: list[float]) -> list[float | None]:
    """Return experts and margins in turn, None for an infinite margin."""
    finite = [round(margin, 4) if math.isfinite(margin) else None for margin in margins]
    return [item for pair in zip(experts, finite) for item in pair]
