"""Learning curves as a picture ([plot] extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from palm_rlhf_pytorch.extras import require
from palm_rlhf_pytorch.files import atomic_path

NOT_CURVES = ("step", "prompts", "lr")


def plot_curves(rows: Sequence[dict[str, float]], path: str | Path, title: str, columns: Sequence[str] = ()) -> Path:
    """One small panel for each metric against the step, written as PNG (or whatever the suffix says)."""
    matplotlib = require("matplotlib", "plot")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", "plot")
    names = columns or list(dict.fromkeys(name for row in rows for name in row if name not in NOT_CURVES))
    names = [name for name in names if any(name in row for row in rows)]
    across = min(4, max(1, len(names)))
    down = -(-len(names) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(3.4 * across, 2.5 * down), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None, linewidth=1.4)
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    figure.suptitle(title)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)
    return Path(path)
