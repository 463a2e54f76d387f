"""The costs of curvature: the references are right, the tables say what was found, the laws are fitted."""

import json
import pathlib

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "analysis"))
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("key", ["tiny", "gpt"])
@pytest.mark.parametrize("kind", ["Hessian", "GGN"])
def test_references_are_double_precision_products(kind, key):
    from curvature_problems import PROBLEMS, reference
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from gradcond import curvature

    model, data = PROBLEMS[key].model(), PROBLEMS[key].data(2)
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        expected = reference(kind, model, data)(v).detach()
    data = [(x.double() if x.is_floating_point() else x, y) for x, y in data]
    found = getattr(curvature, kind)(model.double(), torch.nn.CrossEntropyLoss(), data) @ v
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_known_spectrum_has_a_bulk_and_two_outliers():
    from curvature_problems import known_spectrum

    A, values = known_spectrum()
    torch.testing.assert_close(values.sum(), A.trace())
    assert values[-1] > 20 > 10 < values[-2] and values[-3] < 3
    assert (values.abs() < 1e-12).sum() == 398  # rank 400 and two outliers


def test_the_command_writes_its_tables_without_any_peer(tmp_path, capsys):
    import curvature_cost

    threads = torch.get_num_threads()
    assert curvature_cost.main(["--peers", "--rounds", "1", "--seeds", "1", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    text = capsys.readouterr().out
    assert (tmp_path / "curvature_cost.md").read_text() == text
    assert "missing: curvlinops, hessian-eigenthings, PyHessian, backpack" in text
    found = json.loads((tmp_path / "curvature_cost.json").read_text())
    tables = found["tables"]
    assert found["format"] == 1
    assert len(tables) == 8
    for title, rows in tables.items():
        assert {row["name"].split()[0] for row in rows} == {"gradcond"}
        allowed = 0.5 if "trace" in title else 1e-5
        assert all(row["error"] < allowed and row["ms"] > 0 and row["peak_bytes"] > 0 for row in rows), title


def test_a_peer_that_raises_or_is_wrong_is_told_and_not_compared_with(capsys):
    import curvature_cost
    from curvature_contestants import Outcome

    def fails():
        raise NotImplementedError("no such kernel\nat all")

    def answers(value):
        return lambda: lambda seed: Outcome(torch.full((1000,), value).sum() / 1000, 1)

    args = curvature_cost.parse(["--rounds", "2"])
    entries = {"gradcond": answers(1.0), "other": answers(1.0), "wrong": answers(2.0), "none": fails}
    rows = curvature_cost.measure("t", entries, lambda run: {"error": float(run(0).answer - 1)}, args)
    assert rows[0]["time_peer"] == rows[0]["peak_peer"] == "other" and rows[0]["peak_ratio"] == 1
    text = curvature_cost.markdown({"machine": {}, "tables": {"t": rows}})
    assert "| none |  |  |  |  |  | raises NotImplementedError: no such kernel |" in text
    line = curvature_cost.summary({"tables": {"t": rows}}).splitlines()[-1]
    assert line.startswith("| t | ") and line.endswith("| other | 1.00 | other |")
    with pytest.raises(NotImplementedError):  # our own failure is one
        curvature_cost.measure("t", {"gradcond": fails}, lambda run: {}, args)


def test_peak_counts_arrays_of_numpy_too():
    from curvature_contestants import Outcome
    from curvature_cost import peak

    def prepare():
        return lambda seed: Outcome((np.ones(2**20), torch.ones(2**20)), 1)

    assert 12 * 2**20 <= peak(prepare, 1) < 13 * 2**20


def test_peak_counts_bytes_that_are_kept_however_few():
    from curvature_contestants import Outcome
    from curvature_cost import peak

    def prepare():
        kept = bytearray(2**16)
        return lambda seed: Outcome(torch.ones(2**16 + len(kept) // 2**16 - 1), 1)

    assert 5 * 2**16 <= peak(prepare, 1) < 6 * 2**16


def test_growth_of_products_densities_and_blocks_is_printed(capsys):
    import curvature_scale

    assert curvature_scale.main(["--rounds", "1"]) == 0
    text = capsys.readouterr().out
    assert all(f"{sweep}: {{'sizes'" in text for sweep in ("parameters", "batches", "steps"))
    assert "ten blocks: {'Hessian, 1 batch': {'side by side': " in text


def test_growth_is_fitted_by_a_power_law(monkeypatch):
    import curvature_growth
    import step_timing

    now = [0.0]  # moved by the runs alone: what else the machine does is not seen
    monkeypatch.setattr(step_timing.time, "process_time", lambda: now[0])

    class Args:
        rounds = 3

    def taking(seconds):
        def run():
            now[0] += seconds

        return run

    law = curvature_growth._law({size: taking(0.01 * size**1.5) for size in (1, 2, 4, 8)}, Args())
    assert law["sizes"] == [1, 2, 4, 8] and law["ms"] == pytest.approx([10, 800**0.5, 80, 51200**0.5])
    assert law["exponent"] == pytest.approx(1.5, abs=1e-9)


def test_a_killed_run_goes_on_from_the_products_it_has_made(tmp_path, monkeypatch):
    import curvature_scale

    from gradcond import curvature

    (tmp_path / "text").write_bytes(bytes(range(200)) * 12)
    made, product, most = [], curvature.Hessian._columns, [10**9]

    def counted(self, V):
        made.append(1)
        if len(made) > most[0]:
            raise KeyboardInterrupt
        return product(self, V)

    class Padded(torch.nn.Embedding):
        """Four numbers a byte, and the rest of its 256 logits from them."""

        def forward(self, x):
            return super().forward(x).flatten(0, 1).repeat(1, 64)

    monkeypatch.setattr(curvature_scale, "large_gpt", lambda: Padded(256, 4).float())
    monkeypatch.setattr(curvature.Hessian, "_columns", counted)

    def run(out):
        made.clear()
        options = ["--text", str(tmp_path / "text"), "--samples", "8", "--batch", "2", "--tol", "1e-2"]
        return curvature_scale.main(
            ["--network", "gpt", *options, "--train", "2", "--steps", "5", "--out", str(tmp_path / out)]
        )

    assert run("whole") == 0
    all_products = len(made)
    most[0] = 20
    assert run("killed") == 130
    assert not (tmp_path / "killed" / "curvature_scale.json").exists()
    most[0] = 10**9
    assert run("killed") == 0
    assert all_products - 20 < len(made) < all_products
    found = [dict(np.load(tmp_path / out / "curvature_scale.npz")) for out in ("whole", "killed")]
    assert all(np.array_equal(found[0][key], found[1][key]) for key in found[0])
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [
        "curvature_scale.json",
        "curvature_scale.npz",
    ]
    report = json.loads((tmp_path / "killed" / "curvature_scale.json").read_text())
    assert (report["format"], report["settings"]["network"], report["parameters"]) == (1, "gpt", 1024)
    assert set(report["versions"]) == {"gradcond", "torch", "numpy", "scipy", "python"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rounds", "0"],
        ["--network", "resnet18"],
        ["--samples", "0"],
        ["--batch", "1"],
        ["--vectors", "6"],
        ["--tol", "0"],
    ],
)
def test_the_scale_command_refuses(arguments, capsys):
    import curvature_scale

    with pytest.raises(SystemExit):
        curvature_scale.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_the_scale_command_tells_of_files_of_another_kind(tmp_path, capsys):
    import curvature_scale

    text, images = tmp_path / "text", tmp_path / "i.npz"
    text.write_text("no archive")
    np.savez(images, x_train=np.zeros((5, 28, 28)), y_train=np.zeros(5))
    for given, words in (
        (["--images", text], "expected an .npz file with x_train, y_train"),
        (["--images", images], "expected images of 32 x 32 x 3, got (2, 28, 28)"),
        (["--images", images, "--checkpoint", text], "truncated, corrupt or of another format"),
    ):
        assert curvature_scale.main(["--network", "resnet18", "--samples", "2", *map(str, given)]) == 2
        assert words in capsys.readouterr().err


def test_texts_and_images_are_batched(tmp_path):
    from command import InputError
    from curvature_data import Images, Text

    (tmp_path / "text").write_bytes(bytes(range(100)))
    batches = list(Text([tmp_path / "text"], 10, 2, tokens=30))
    assert [len(x) for x, _ in batches] == [2, 1]
    x, y = batches[0]
    assert (y.view_as(x) == x + 1).all()
    with pytest.raises(InputError, match="at least 101 bytes, got 100"):
        Text([tmp_path / "text"], 10, 2, tokens=100)
    np.savez(tmp_path / "i.npz", x_train=np.zeros((5, 32, 32, 3), np.uint8), y_train=np.zeros((5, 1), np.uint8))
    images = Images(tmp_path / "i.npz", 4, 3)
    assert len(images) == 2 and [tuple(x.shape) for x, _ in images] == [(3, 3, 32, 32), (1, 3, 32, 32)]
