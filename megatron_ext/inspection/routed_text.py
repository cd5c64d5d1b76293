"""A text, where its tokens were routed, and a picture of it coloured by their fan-out."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.patches import Rectangle

from megatron_ext.reports.run_metrics import Floats

if TYPE_CHECKING:
    from megatron_ext.inference.loading import TrainedModel

# Light enough everywhere for black text.
FAN_OUT_COLOURS = LinearSegmentedColormap.from_list("fan-out", ["#FFFFFF", "#CDE5F5", "#6FB1DE"])
_TEXT_SIZE = 8.5  # points
_COLUMNS = 158  # letters of that size side by side
_CONTEXT = 8  # tokens before a token that decide how it is written


@dataclass(frozen=True)
class RoutedText:
    """A text and where its tokens were routed.

    Attributes:
        tokens: the text in pieces.
        layers: numbers of the MoE layers.
        experts: for each layer and token the experts that took it.
        margins: for each layer and token the margins of those experts.
        losses: nats, how surprising each token was; NaN for those that nothing predicts.
    """

    tokens: list[str]
    layers: list[int]
    experts: list[list[list[int]]]
    margins: list[list[list[float]]]
    losses: list[float]

    @property
    def fan_out(self) -> Floats:
        """Mean number of routed experts over the MoE layers, `[tokens]`."""
        return np.array([[len(e) for e in layer] for layer in self.experts], dtype=float).mean(0)


def route(trained: "TrainedModel", tokens: list[int]) -> RoutedText:
    """Route a text of any length, in windows that do not see each other.

    Raises:
        ValueError: no token, or a model without experts.
    """
    import torch

    from megatron_ext.inference.text_routing import route_text

    length = trained.max_length
    windows = [
        route_text(trained, tokens[start : start + length])
        for start in range(0, max(1, len(tokens)), length)
    ]
    maps, margins = (
        torch.cat([getattr(window, name) for window in windows], dim=1)  # [layers, tokens, experts]
        for name in ("maps", "margins")
    )
    return RoutedText(
        tokens=pieces(trained.tokenizer, tokens),
        layers=windows[0].layers,
        experts=[[token.nonzero().flatten().tolist() for token in layer] for layer in maps],
        margins=[
            [margin[token].tolist() for token, margin in zip(*layer)]
            for layer in zip(maps, margins)
        ],
        losses=torch.cat([window.losses for window in windows]).tolist(),
    )


def pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    """What each token adds to the text; bytes of one letter show at the last of them."""
    shown, before, start = [], "", 0
    for count in range(1, len(tokens) + 1):
        after = tokenizer.detokenize(tokens[start:count])
        if after.endswith("\N{REPLACEMENT CHARACTER}") or not after.startswith(before):
            shown.append("")
            continue
        shown.append(after[len(before) :])
        before = after
        if count - start >= 4 * _CONTEXT:
            start = count - _CONTEXT
            before = tokenizer.detokenize(tokens[start:count])
    return shown


def shown_token(token: str) -> str:
    """A token as one line shows it: line ends as a sign."""
    return token.replace("\n", "↵").replace("\t", " ")


def lines_of(text: RoutedText) -> list[list[int]]:
    """Indices of the tokens on each line of the picture, broken between words."""
    words: list[list[int]] = []
    for index, token in enumerate(text.tokens):
        if not words or token[:1].isspace() or "\n" in text.tokens[index - 1]:
            words.append([])
        words[-1].append(index)
    lines: list[list[int]] = [[]]
    used = 0
    for word in words:
        width = sum(len(shown_token(text.tokens[index])) for index in word)
        ended = lines[-1] and "\n" in text.tokens[lines[-1][-1]]
        if used and (ended or used + width > _COLUMNS):
            lines.append([])
            used = 0
        lines[-1] += word
        used += width
    return lines


def height(lines: list[list[int]]) -> float:
    """Inches that the lines take."""
    return (len(lines) * 1.55 * _TEXT_SIZE + 20) / 72


def draw_text(axes: Axes, text: RoutedText, lines: list[list[int]]) -> None:
    """Fill a panel with the text."""
    fan_out = text.fan_out
    norm = Normalize(0, max(1.0, float(fan_out.max())))
    font: dict[str, Any] = {"family": "DejaVu Sans Mono", "size": _TEXT_SIZE, "va": "center"}
    for row, line in enumerate(lines):
        column = 0
        for index in line:
            token = shown_token(text.tokens[index])
            colour = FAN_OUT_COLOURS(norm(fan_out[index]))
            axes.add_patch(Rectangle((column, row - 0.42), len(token), 0.84, color=colour, lw=0))
            # One by one, so that letters keep to the grid whatever the size of the picture.
            for offset, letter in enumerate(token):
                axes.text(column + offset + 0.5, row, letter, ha="center", **font)
            column += len(token)
    axes.set_xlim(0, _COLUMNS + 2)
    axes.set_ylim(len(lines) - 0.5, -0.6)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title("Where experts go: a text routed by thresholds", y=1.0)
    scale = ScalarMappable(norm, FAN_OUT_COLOURS)
    assert axes.figure is not None
    inch = 1 / height(lines)  # in units of the panel's height
    bar = axes.figure.colorbar(
        scale, cax=axes.inset_axes((0.82, 1 + 0.1 * inch, 0.18, 0.1 * inch)),
        orientation="horizontal", ticklocation="top",
    )  # fmt: skip
    bar.ax.tick_params(length=2, labelsize=8)
    axes.text(
        0.81, 1 + 0.15 * inch, "experts a token (mean of the MoE layers)", ha="right", va="center",
        fontsize=8, transform=axes.transAxes,
    )  # fmt: skip
