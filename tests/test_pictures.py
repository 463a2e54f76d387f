"""What is drawn can be read: names as the user wrote them, numbers on every axis, nothing cut off."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1] / "analysis"))

import condition_figure
import convergence
import spectrum_figure
from metrics import COLUMNS
from spectra import measure_exact
from trajectory_figure import draw_trajectory


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, after they have been laid out."""
    figures, save = [], Figure.savefig

    def savefig(self, *args, **kwargs):
        save(self, *args, **kwargs)
        figures.append(self)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def report(*spectra, label="last"):
    """What the spectrum command would have measured of matrices with these eigenvalues."""
    entries, arrays = [], {}
    for index, values in enumerate(spectra):
        A = torch.diag(torch.tensor(values))
        numbers, own = measure_exact(lambda A=A: A, lambda name, measure: measure(), top=3)
        entries.append({"label": f"{label}{index}", "parameters": len(A), "plain": numbers})
        arrays |= {f"{index}/plain/{name}": array for name, array in own.items()}
    return {"checkpoints": entries}, arrays


def test_names_are_drawn_letter_by_letter(drawn, tmp_path):
    names = ["_baseline", "$x_{$", "lr0.5"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(f"{','.join(COLUMNS)}\n0,1,2.0,0.1,\n")
    assert convergence.main([*(str(tmp_path / name) for name in names), "--out", str(tmp_path / "a.png")]) == 0
    written = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert [text.strip("\u200b").replace("\\$", "$") for text in written] == names


def test_a_line_has_a_gap_where_there_is_no_value(drawn, tmp_path):
    losses = ["3.0", "nan", "2.0", "nan", "1.5", "1.25"]
    rows = [f"0,{step},{loss},0.1," for step, loss in enumerate(losses)]
    (tmp_path / "metrics.csv").write_text("\n".join([",".join(COLUMNS), *rows]))
    assert convergence.main([str(tmp_path), "--out", str(tmp_path / "a.png")]) == 0
    line = drawn[0].axes[0].lines[0]
    np.testing.assert_array_equal(line.get_ydata(), [float(loss) for loss in losses])
    assert line.get_marker() == "o" and list(line.get_markevery()) == [0, 2]


@pytest.mark.parametrize(
    "values",
    [[2.0], [0.6, 8.4], [-5.1, -0.4], [1.0, 1.0], [0.0, 0.0], [1e6, -1e-6], [3e-9, 1e-12, 0.0]],
    ids=str,
)
def test_any_spectrum_has_numbers_on_its_axis(values, drawn, tmp_path):
    spectrum_figure.draw(*report(values), tmp_path / "a.png")
    (axes,) = drawn[0].axes
    assert axes.get_axisbelow() is True  # no line of the grid cuts through a curve
    low, high = axes.get_xlim()
    shown = [text.get_text() for text in axes.get_xticklabels() if low <= text.get_position()[0] <= high]
    assert len(shown) >= 3 and all(shown)


def test_long_names_leave_room_for_what_they_name(drawn, tmp_path):
    measured, arrays = report([2.0, 1.0], [3.0, 1e-3], label="epoch=10-val_loss=0.123-train_acc=0.9-")
    spectrum_figure.draw(measured, arrays, tmp_path / "a.png")
    draw_trajectory(measured, tmp_path / "b.png")
    spectra, trajectory = drawn
    titles = [axes.title.get_window_extent() for axes in spectra.axes]
    assert titles[0].x1 < titles[1].x0 and titles[1].x1 <= spectra.bbox.x1
    for axes in trajectory.axes:
        label, panel = axes.yaxis.label.get_window_extent(), axes.get_window_extent()
        assert label.y0 >= 0 and label.y1 <= trajectory.bbox.y1
        assert panel.height > 0.4 * trajectory.bbox.height


def conditions(*names, checkpoints=1):
    """What the condition number command would have measured of layers with these names."""
    kappa = {"resolved": True, "converged": True, "kappa": 10.0, "noise_floor": 1e-6}
    blocks = [{"name": name, "kind": "Linear", "kappa": {"plain": kappa}} for name in names]
    blocks = [block | {"units": None, "input_correlation": None} for block in blocks]
    return {"checkpoints": [{"label": "a", "variants": ["plain"], "blocks": blocks}] * checkpoints}


def test_names_of_layers_are_drawn_letter_by_letter(drawn, tmp_path):
    condition_figure.draw(conditions("$x_{", "_y", "layers.0.attention.projection.query"), tmp_path / "a.png")
    written = [text.get_text().strip("\u200b").replace("\\$", "$") for text in drawn[0].axes[0].get_yticklabels()]
    assert written == ["$x_{ Linear", "_y Linear", "layers.0.attention.projection.qu\nery Linear"]


@pytest.mark.parametrize("kappas", [(2.8, 3.4), (1.0, 1.0), (7.0, 2e5)], ids=str)
def test_condition_numbers_have_whole_decades(kappas, drawn, tmp_path):
    measured = conditions("0", "2")
    for block, kappa in zip(measured["checkpoints"][0]["blocks"], kappas, strict=True):
        block["kappa"] = {"plain": block["kappa"]["plain"] | {"kappa": kappa}}
    condition_figure.draw(measured, tmp_path / "a.png")
    (axes,) = drawn[0].axes
    low, high = np.log10(axes.get_xlim())
    assert low == round(low) < np.log10(min(kappas)) + 1e-9 and high == round(high) > np.log10(max(kappas))
    assert not any(text.get_text() for text in axes.get_xticklabels(minor=True))


def test_many_checkpoints_have_two_panels_a_row(drawn, tmp_path):
    condition_figure.draw(conditions("0", "2", checkpoints=5), tmp_path / "a.png")
    shown = [axes for axes in drawn[0].axes if axes.get_visible()]
    assert len(shown) == 5 and drawn[0].get_figwidth() == 12
    assert len({axes.get_position().x0 for axes in shown}) == 2
