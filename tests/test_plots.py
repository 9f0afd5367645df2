import sys

import pytest

from palm_rlhf_pytorch import plots
from palm_rlhf_pytorch.plots import plot_curves

figures = pytest.importorskip("matplotlib.figure")
ROWS = [
    {"step": 1, "loss": 3.0, "lr": 0.1, "prompts": 4, "steps_per_second": 9.0},
    {"step": 2, "loss": 2.0, "held_out_loss": 2.5, "held_out_spearman": 0.1},
    {"step": 3, "loss": float("nan"), "held_out_loss": 2.0},
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written."""
    seen = []
    save = figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *a, **k: (seen.append(self), save(self, *a, **k))[1])
    return seen


def panels(figure):
    return {
        axis.get_title(): [(line.get_label(), line.get_xydata().tolist()) for line in axis.lines]
        for axis in figure.axes
        if axis.get_visible()
    }


def test_a_panel_for_each_metric_with_what_is_held_out_beside(tmp_path, drawn):
    path = plot_curves(ROWS, tmp_path / "deep" / "curves.png", "a title")
    assert path.read_bytes().startswith(b"\x89PNG")
    found = panels(drawn[0])
    assert list(found) == ["loss", "held out spearman"]
    (loss, points), (held_out, held_out_points) = found["loss"]
    assert (loss, held_out) == ("loss", "held out loss")
    assert points[:2] == [[1, 3.0], [2, 2.0]] and held_out_points == [[2, 2.5], [3, 2.0]]
    assert found["held out spearman"][0][1] == [[2, 0.1]]
    assert drawn[0].get_suptitle() == "a title"


def test_columns_choose(tmp_path, drawn):
    plot_curves(ROWS, tmp_path / "curves.png", "", ("held_out_loss", "missing"))
    assert list(panels(drawn[0])) == ["held out loss"]


def test_as_many_panels_as_needed(tmp_path, drawn):
    plot_curves([{"step": 1, **{f"m{i}": i for i in range(5)}}], tmp_path / "curves.png", "")
    assert list(panels(drawn[0])) == [f"m{i}" for i in range(5)] and len(drawn[0].axes) == 8


@pytest.mark.parametrize("rows", [[], [{"step": 1}]])
def test_nothing_to_draw_is_no_error(tmp_path, rows):
    assert plot_curves(rows, tmp_path / "curves.png", "").is_file()


def test_the_users_own_figures_are_left_alone(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_backend(), pyplot.get_fignums()
    plot_curves(ROWS, tmp_path / "curves.png", "")
    assert (pyplot.get_backend(), pyplot.get_fignums()) == before


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"\[plot\]"):
        plots.plot_curves(ROWS, tmp_path / "curves.png", "")
