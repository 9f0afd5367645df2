"""Learning curves as a picture ([plot] extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from palm_rlhf_pytorch.extras import require
from palm_rlhf_pytorch.files import atomic_path

NOT_CURVES = ("step", "prompts", "lr", "steps_per_second")
HELD_OUT = "held_out_"


def plot_curves(rows: Sequence[dict[str, float]], path: str | Path, title: str, columns: Sequence[str] = ()) -> Path:
    """One small panel for each metric against the step, written as PNG (or whatever the suffix says).

    What is measured on held-out data too is drawn beside it.
    """
    figures = require("matplotlib.figure", "plot")  # not pyplot, whose backend is the user's
    there = list(dict.fromkeys(name for row in rows for name in row if name not in NOT_CURVES))
    names = [name for name in columns or there if name in there]
    panels = [name for name in names if name.removeprefix(HELD_OUT) == name or name.removeprefix(HELD_OUT) not in names]
    across = min(4, max(1, len(panels)))
    down = max(1, -(-len(panels) // across))
    figure = figures.Figure(figsize=(3.4 * across, 2.5 * down))
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        drawn = [name for name in (panel, HELD_OUT + panel) if name in names]
        for name in drawn:
            points = [(row["step"], row[name]) for row in rows if name in row]
            marker = "." if len(points) < 30 else None
            axis.plot(*zip(*points, strict=True), marker=marker, linewidth=1.4, label=name.replace("_", " "))
        if len(drawn) > 1:
            axis.legend(fontsize=8)
        axis.set_title(panel.replace("_", " "), fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(title)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    return Path(path)
