"""Pictures of a study: grades over steps, training, gain of gold over agreement, gold over KL."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from alignment.evaluation.study.grade_curves import GRADES, draw_grades, grade_panel, score_range
from alignment.evaluation.study.outcome_pictures import (
    agreement_panel,
    agreement_points,
    draw_agreement,
    draw_kl,
    kl_panel,
    policies_with_kl,
)
from alignment.evaluation.study.study_runs import PolicyStudy
from alignment.evaluation.study.training_curves import training_panels
from megatron_ext.reports.plotting import STYLE, Panel, panel_png, write_picture

# Names are untrusted, so that a dollar in them must not begin a formula. SVG files contain text as
# text, and are reproducible.
_RC = STYLE | {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "study"}


def draw(study: PolicyStudy, folder: Path) -> dict[str, Path]:
    """Write each picture that has data as PNG and SVG, and delete outdated ones.

    Args:
        study: Study to draw.
        folder: Folder of the pictures.

    Returns:
        The PNG files by the name of the picture.
    """
    matplotlib.use("agg")
    pictures: dict[str, Callable[[PolicyStudy], Figure | None]] = {
        "curves": draw_grades, "training": _training, "agreement": draw_agreement, "kl": draw_kl,
    }  # fmt: skip
    files = {}
    with matplotlib.rc_context(_RC):
        for name, draw_one in pictures.items():
            for stale in (".png", ".svg"):
                (folder / f"{name}{stale}").unlink(missing_ok=True)
            if (figure := draw_one(study)) is not None:
                files[name] = folder / f"{name}.png"
                write_picture(figure, files[name])
                write_picture(figure, folder / f"{name}.svg")
    return files


def page_panels(study: PolicyStudy) -> dict[str, list[tuple[bytes, str]]]:
    """Return the panels of the page, as PNG with a description, by section.

    On a page each panel is an image by itself, so that a narrow screen shows one below the other.
    """
    matplotlib.use("agg")
    names = [name for name in GRADES if study.has(name)]
    limits = score_range(study, names)
    sections: dict[str, list[Panel]] = {
        "curves": [
            Panel(study.label(group), partial(grade_panel, study, group, names, limits))
            for group in study.groups
            if group.graded
        ],
        "training": training_panels(study),
        "kl": [Panel(f"gold against KL, {policy}", partial(kl_panel, study, policy))
               for policy in policies_with_kl(study)],
    }  # fmt: skip
    if points := agreement_points(study):
        title = "gain in gold against the agreement of the judge with gold"
        sections["agreement"] = [Panel(title, partial(agreement_panel, study, points))]
    with matplotlib.rc_context(_RC):
        return {
            name: [(panel_png(panel.draw), panel.title) for panel in panels]
            for name, panels in sections.items()
            if panels
        }


def _training(study: PolicyStudy) -> Figure | None:
    if not (panels := training_panels(study)):
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.4 * columns, 2.7 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(grid.flat, panels):
        panel.draw(axes)
    return figure
