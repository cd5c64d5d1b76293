"""Text with the routing of its tokens, and its picture colored by fan-out."""

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

# All of these colors are light enough for black text.
FAN_OUT_COLORS = LinearSegmentedColormap.from_list("fan-out", ["#FFFFFF", "#CDE5F5", "#6FB1DE"])
_TEXT_SIZE = 8.5  # points
_COLUMNS = 158  # characters per line
_CONTEXT = 8  # preceding tokens that determine the text of a token


@dataclass(frozen=True)
class RoutedText:
    """Text with the routing of its tokens.

    Attributes:
        tokens: Text of each token.
        layers: Numbers of the MoE layers.
        experts: Experts that took a token, by layer and token.
        margins: Margins of these experts, by layer and token.
        losses: Loss of each token in nats; NaN for tokens that the model does not predict.
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
    """Route a text of any length, in independent windows of the model's context length.

    Args:
        trained: Model to use.
        tokens: Token ids of the text.

    Raises:
        ValueError: There are no tokens, or the model has no experts.
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
    """Return the text that each token adds.

    If several tokens encode one character, the last of them adds it and the others add nothing.
    """
    texts, before, start = [], "", 0
    for count in range(1, len(tokens) + 1):
        after = tokenizer.detokenize(tokens[start:count])
        if after.endswith("\N{REPLACEMENT CHARACTER}") or not after.startswith(before):
            texts.append("")
            continue
        texts.append(after[len(before) :])
        before = after
        if count - start >= 4 * _CONTEXT:
            start = count - _CONTEXT
            before = tokenizer.detokenize(tokens[start:count])
    return texts


def shown_token(token: str) -> str:
    """Return the text of a token on one line, with a sign in place of a line break."""
    return token.replace("\n", "↵").replace("\t", " ")


def lines_of(text: RoutedText) -> list[list[int]]:
    """Return the indices of the tokens on each line of the picture, wrapped between words."""
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
    """Return the height of the lines in inches."""
    return (len(lines) * 1.55 * _TEXT_SIZE + 20) / 72


def draw_text(axes: Axes, text: RoutedText, lines: list[list[int]]) -> None:
    """Draw the text into a panel, colored by fan-out."""
    fan_out = text.fan_out
    norm = Normalize(0, max(1.0, float(fan_out.max())))
    font: dict[str, Any] = {"family": "DejaVu Sans Mono", "size": _TEXT_SIZE, "va": "center"}
    for row, line in enumerate(lines):
        column = 0
        for index in line:
            token = shown_token(text.tokens[index])
            color = FAN_OUT_COLORS(norm(fan_out[index]))
            axes.add_patch(Rectangle((column, row - 0.42), len(token), 0.84, color=color, lw=0))
            # Draw characters one by one to align them to the grid at any size of the picture.
            for offset, letter in enumerate(token):
                axes.text(column + offset + 0.5, row, letter, ha="center", **font)
            column += len(token)
    axes.set_xlim(0, _COLUMNS + 2)
    axes.set_ylim(len(lines) - 0.5, -0.6)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title("Number of experts per token of a text", y=1.0)
    scale = ScalarMappable(norm, FAN_OUT_COLORS)
    assert axes.figure is not None
    inch = 1 / height(lines)  # in units of the panel's height
    bar = axes.figure.colorbar(
        scale, cax=axes.inset_axes((0.82, 1 + 0.1 * inch, 0.18, 0.1 * inch)),
        orientation="horizontal", ticklocation="top",
    )  # fmt: skip
    bar.ax.tick_params(length=2, labelsize=8)
    axes.text(
        0.81, 1 + 0.15 * inch, "experts per token (mean of the MoE layers)", ha="right",
        va="center", fontsize=8, transform=axes.transAxes,
    )  # fmt: skip
