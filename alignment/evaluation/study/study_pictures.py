"""Pictures of a study: grades over steps, gain of gold over agreement, and gold over KL."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from alignment.evaluation.study.seed_summary import SeedMean, curve, mean_of, trend_of
from alignment.evaluation.study.study_runs import GOLD, KL, PROXY, SECOND, PolicyStudy, SeedGroup
from megatron_ext.reports.plotting import BLUE, CYCLE, GREEN, GREY, STYLE, VERMILION, write_picture

# Label, color and width of each grade. The second gold often coincides with gold, and is drawn as a
# wider line below it.
GRADES = {
    PROXY: ("proxy: the judge trained against", BLUE, 1.9),
    GOLD: ("gold", VERMILION, 1.9),
    SECOND: ("second gold", GREEN, 4.5),
}
_MOST_COLUMNS = 3
_MARKERS = "os^Dvp*X"
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
        "curves": _curves, "agreement": _agreement, "kl": _kl,
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


def _curves(study: PolicyStudy) -> Figure:
    """Draw one panel per group: one row per policy, or several rows of judges of one policy."""
    several = len(study.policies) > 1
    columns = len(study.judges) if several else min(_MOST_COLUMNS, len(study.groups))
    rows = len(study.policies) if several else -(-len(study.groups) // columns)
    figure = Figure(figsize=(max(6.0, 3.9 * columns), 3.0 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat:
        axes.set_axis_off()
    shown = [name for name in GRADES if study.has(name)]
    measures = " or ".join(sorted({run.measure for run in study.runs if run.gradings}))
    for number, group in enumerate(study.groups):
        place = divmod(number, columns)
        if several:
            place = study.policies.index(group.policy), study.judges.index(group.judge)
        axes = grid[place]
        axes.set_axis_on()
        _group(axes, group, shown)
        name = _short(group.judge, 30)
        if several:
            name = f"{_short(group.judge, 16)} on {_short(group.policy, 12)}"
        axes.set_title(f"{name}, n = {len(group.graded)}", fontsize=10)
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("step")
        if place[1] == 0:
            axes.set_ylabel(f"{measures}, held-out prompts")
    figure.axes[0].set_ylim(_range(study, shown))
    handles, labels = [], []
    for label, color, width in (GRADES[name] for name in shown):
        handles += figure.axes[0].plot([], [], color=color, lw=width)
        labels.append(label)
    if any(run.alarms for run in study.runs):
        handles.append(figure.axes[0].plot([], [], "x", color="black", ms=6, mew=1.6)[0])
        labels.append("first alarm of a run")
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _range(study: PolicyStudy, shown: Sequence[str]) -> tuple[float, float]:
    """Return the range of the vertical axis, by the curves of single seeds.

    The intervals are ignored, because with two or three seeds they may be much wider.
    """
    values = [v for run in study.runs for name in shown for v in run.graded(name).values()]
    low, high = min(values, default=0.0), max(values, default=9.0)
    margin = max(0.25, 0.12 * (high - low))
    return low - margin, high + margin


def _group(axes: Axes, group: SeedGroup, shown: Sequence[str]) -> None:
    for name in reversed(shown):
        _, color, width = GRADES[name]
        steps, means = curve(group, name)
        if not steps:
            continue
        for run in group.graded:
            series = run.graded(name)
            axes.plot(list(series), list(series.values()), color=color, lw=0.7, alpha=0.45)
            if name == GOLD and run.alarms and (step := run.alarms[0]) in series:
                axes.plot(step, series[step], "x", color="black", ms=6, mew=1.6, zorder=5)
        _mean_curve(axes, steps, means, color, width, len(group.graded))
        if name == PROXY:
            _annotate_fewer(axes, steps, means)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y", color="#E5E5E5", lw=0.6)
    axes.set_axisbelow(True)


def _mean_curve(
    axes: Axes,
    steps: Sequence[int],
    means: Sequence[SeedMean],
    color: str,
    width: float,
    seeds: int,
) -> None:
    """Draw the mean with its interval: solid where it includes all seeds, dashed elsewhere."""
    at, values = np.array(steps), np.array([mean.value for mean in means], dtype=float)
    full = np.array([mean.n == seeds for mean in means])
    axes.plot(at, np.where(full, values, np.nan), color=color, lw=width)
    if not full.all():
        axes.plot(at, values, color=color, lw=1.3, ls=(0, (3, 2)))
    axes.plot(at, values, ".", color=color, ms=4)
    low, high = (
        np.array([getattr(mean, end) for mean in means], dtype=float) for end in ("low", "high")
    )
    axes.fill_between(at, low, high, color=color, alpha=0.15, lw=0)


def _annotate_fewer(axes: Axes, steps: Sequence[int], means: Sequence[SeedMean]) -> None:
    """Annotate the steps at which runs have ended with the number of remaining seeds."""
    for step, before, mean in zip(steps[1:], means, means[1:]):
        if mean.n < before.n and mean.value is not None:
            axes.annotate(f"n = {mean.n}", (step, mean.value), (0, 7), textcoords="offset points",
                          ha="center", fontsize=7.5, color=GREY)  # fmt: skip


def _short(name: str, width: int = 34) -> str:
    return (
        textwrap.shorten(name, width, placeholder="…")
        if " " in name
        else (name if len(name) <= width else name[: width - 1] + "…")
    )


def _agreement(study: PolicyStudy) -> Figure | None:
    points = [
        (group, alpha, change)
        for group in study.groups
        if (alpha := agreement_of(group).value) is not None
        and (change := trend_of(group, GOLD).change).value is not None
    ]
    if not points:
        return None
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color=GREY, lw=1, ls="--")
    for group, alpha, change in points:
        assert change.value is not None
        color = CYCLE[study.policies.index(group.policy) % len(CYCLE)]
        if change.low is not None and change.high is not None:
            axes.plot([alpha, alpha], [change.low, change.high], color=color, lw=1.2, alpha=0.7)
        axes.plot(alpha, change.value, "o", color=color, ms=6)
    # Name each judge once, above all of its points. Policies differ by color.
    for judge in {group.judge: None for group, *_ in points}:
        own = [(alpha, c.high or c.value) for group, alpha, c in points if group.judge == judge]
        at = max(own, key=lambda point: point[1] or 0.0)
        axes.annotate(_short(judge, 24), at, (0, 5), textcoords="offset points", ha="center",
                      fontsize=8)  # fmt: skip
    if len(study.policies) > 1:
        for number, policy in enumerate(study.policies):
            axes.plot([], [], "o", color=CYCLE[number % len(CYCLE)], label=_short(policy))
        axes.legend(loc="best")
    axes.margins(x=0.25, y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("agreement of the judge with gold (Krippendorff's α, interval)")
    axes.set_ylabel("gold, last - first grading")
    axes.set_title("Does agreement tell what training on a judge gives?")
    return figure


def agreement_of(group: SeedGroup) -> SeedMean:
    """Return the mean agreement of the judges of a group, which may differ between seeds."""
    return mean_of(run.agreement for run in group.runs)


def _kl(study: PolicyStudy) -> Figure | None:
    if not study.has(KL):
        return None
    columns = min(_MOST_COLUMNS, len(study.policies))
    rows = -(-len(study.policies) // columns)
    figure = Figure(figsize=(max(6.4, 4.2 * columns), 3.4 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(study.policies) :]:
        axes.set_axis_off()
    for axes, policy in zip(grid.flat, study.policies):
        for group in study.groups:
            if group.policy == policy:
                number = study.judges.index(group.judge)
                _against_kl(axes, group, CYCLE[number % len(CYCLE)], _MARKERS[number % 8])
        axes.set_xlabel("KL from the start policy (nats a response)")
        axes.set_ylabel("gold" if axes is grid[0, 0] else "")
        axes.set_title(_short(policy) if len(study.policies) > 1 else "Gold against KL")
        axes.grid(axis="y", color="#E5E5E5", lw=0.6)
        axes.set_axisbelow(True)
        axes.legend(loc="best")
    return figure


def _against_kl(axes: Axes, group: SeedGroup, color: str, marker: str) -> None:
    """Draw gold over KL: a thin line per seed, and the mean at the gradings that all seeds have."""
    paths = []
    for run in group.graded:
        gold, kl = run.graded(GOLD), run.graded(KL)
        if path := {step: (kl[step], gold[step]) for step in gold if step in kl}:
            paths.append(path)
            axes.plot(*zip(*path.values()), color=color, lw=0.7, alpha=0.4)
    common = sorted(set.intersection(*map(set, paths))) if paths else []
    means = np.array([np.mean([path[step] for path in paths], axis=0) for step in common])
    means = means.reshape(-1, 2)
    label = f"{_short(group.judge, 28)}, n = {len(paths)}"
    axes.plot(*means.T, f"{marker}-", color=color, lw=1.6, ms=4, label=label)
