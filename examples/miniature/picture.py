"""Picture of the differences between rows: losses on the same batches minus those of one row."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from megatron_ext.reports.comparison.compared_runs import ComparedRun, deviation
from megatron_ext.reports.plotting import CYCLE, GREY, STYLE, smoothed, write_picture

_PARTS = 12  # share of the training that a running mean covers


def draw_differences(runs: Mapping[str, Sequence[ComparedRun]], reference: str, path: Path) -> None:
    """Draw the training loss of each row minus that of another, batch by batch, over tokens.

    All rows of a seed train on the same batches, so that most of the noise cancels.

    Args:
        runs: Runs of each row by its label, one per seed, with seeds in the same order.
        reference: Label of the row that is subtracted.
        path: PNG file to write.
    """
    matplotlib.use("agg")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color=GREY, linewidth=0.8)
        for color, (label, of_seeds) in zip(CYCLE, runs.items()):
            if label == reference:
                continue
            curves = []
            for ours, theirs in zip(of_seeds, runs[reference]):
                tokens, losses = ours.curve("loss")
                _, others = theirs.curve("loss")
                shared = min(len(losses), len(others))
                difference = losses[:shared] - others[:shared]
                curves.append(smoothed(tokens[:shared], difference, max(1, shared // _PARTS)))
            shared = min(len(at) for at, _ in curves)
            at, values = curves[0][0][:shared], np.array([values[:shared] for _, values in curves])
            mean, spread = values.mean(axis=0), deviation(values)
            axes.plot(at / 1e6, mean, color=color, label=label)
            axes.fill_between(at / 1e6, mean - spread, mean + spread, color=color, alpha=0.15, lw=0)
        axes.set_title(f"Training loss minus that of {reference}")
        axes.set_xlabel(f"training tokens (M); running mean over 1/{_PARTS} of them")
        axes.set_ylabel("nats per token")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        write_picture(figure, path)
