"""Pictures of outcomes: gain of gold over the judge's agreement with gold, and gold over KL."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from alignment.evaluation.study.grade_curves import MOST_COLUMNS, short_name
from alignment.evaluation.study.seed_summary import SeedMean, mean_of, trend_of
from alignment.evaluation.study.study_runs import GOLD, KL, PolicyStudy, SeedGroup, StudyRun
from megatron_ext.reports.plotting import CYCLE, GREY, MARKERS

AgreementPoint = tuple[SeedGroup, float, SeedMean]


def agreement_points(study: PolicyStudy) -> list[AgreementPoint]:
    """Return the groups with their agreement and their change of gold; none for a single one."""
    points = [
        (group, alpha, change)
        for group in study.groups
        if (alpha := agreement_of(group).value) is not None
        and (change := trend_of(group, GOLD).change).value is not None
    ]
    return points if len(points) > 1 else []


def draw_agreement(study: PolicyStudy) -> Figure | None:
    """Draw the gain in gold of each group against the agreement of its judge with gold."""
    if not (points := agreement_points(study)):
        return None
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    agreement_panel(study, points, figure.subplots())
    return figure


def agreement_panel(study: PolicyStudy, points: Sequence[AgreementPoint], axes: Axes) -> None:
    """Draw the gain in gold against agreement on some axes."""
    axes.axhline(0, color=GREY, lw=1, ls="--")
    for group, alpha, change in points:
        assert change.value is not None
        color = CYCLE[study.policies.index(group.policy) % len(CYCLE)]
        if change.low is not None and change.high is not None:
            axes.plot([alpha, alpha], [change.low, change.high], color=color, lw=1.2, alpha=0.7)
        axes.plot(alpha, change.value, "o", color=color, ms=6)
    # Name each judge once, above all of its points. Policies differ by color.
    for judge in {group.judge: None for group, *_ in points}:
        points_of_judge = [
            (alpha, c.high or c.value) for group, alpha, c in points if group.judge == judge
        ]
        highest = max(points_of_judge, key=lambda point: point[1] or 0.0)
        axes.annotate(short_name(judge, 24), highest, (0, 5), textcoords="offset points",
                      ha="center", fontsize=8)  # fmt: skip
    if len(study.policies) > 1:
        for number, policy in enumerate(study.policies):
            axes.plot([], [], "o", color=CYCLE[number % len(CYCLE)], label=short_name(policy))
        axes.legend(loc="best")
    axes.margins(x=0.25, y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("agreement of the judge with gold (Krippendorff's α, interval)")
    axes.set_ylabel("gold, last - first grading")
    axes.set_title("Gain in gold against agreement", fontsize=10)


def agreement_of(group: SeedGroup) -> SeedMean:
    """Return the mean agreement of the judges of a group, which may differ between seeds."""
    return mean_of(run.agreement for run in group.runs)


def policies_with_kl(study: PolicyStudy) -> list[str]:
    """Return the policies of which some run has gradings with gold and KL."""
    return [
        policy
        for policy in study.policies
        if any(_kl_path(run) for group in study.groups if group.policy == policy
               for run in group.runs)
    ]  # fmt: skip


def draw_kl(study: PolicyStudy) -> Figure | None:
    """Draw gold against KL, a panel for each policy."""
    if not (policies := policies_with_kl(study)):
        return None
    columns = min(MOST_COLUMNS, len(policies))
    rows = -(-len(policies) // columns)
    figure = Figure(figsize=(max(6.4, 4.2 * columns), 3.4 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(policies) :]:
        axes.set_axis_off()
    for axes, policy in zip(grid.flat, policies):
        kl_panel(study, policy, axes)
    return figure


def kl_panel(study: PolicyStudy, policy: str, axes: Axes) -> None:
    """Draw gold against KL of the groups of a policy."""
    for group in study.groups:
        if group.policy == policy:
            number = study.judges.index(group.judge)
            _against_kl(axes, group, CYCLE[number % len(CYCLE)], MARKERS[number % 8])
    axes.set_xlabel("KL from the start policy (nats per response)")
    axes.set_ylabel("gold")
    axes.set_title(
        short_name(policy) if len(study.policies) > 1 else "Gold against KL", fontsize=10
    )
    axes.grid(axis="y", color="#E5E5E5", lw=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="best")


def _kl_path(run: StudyRun) -> dict[int, tuple[float, float]]:
    """Return KL and gold of the gradings that have both, by step."""
    gold, kl = run.graded(GOLD), run.graded(KL)
    return {step: (kl[step], gold[step]) for step in gold if step in kl}


def _against_kl(axes: Axes, group: SeedGroup, color: str, marker: str) -> None:
    """Draw gold over KL: a thin line per seed, and the mean at the gradings that all seeds have."""
    paths = []
    for run in group.graded:
        if path := _kl_path(run):
            paths.append(path)
            axes.plot(*zip(*path.values()), color=color, lw=0.7, alpha=0.4)
    common = sorted(set.intersection(*map(set, paths))) if paths else []
    means = np.array([np.mean([path[step] for path in paths], axis=0) for step in common])
    means = means.reshape(-1, 2)
    if not paths:
        return
    label = f"{short_name(group.judge, 28)}, n = {len(paths)}"
    axes.plot(*means.T, f"{marker}-", color=color, lw=1.6, ms=4, label=label)
