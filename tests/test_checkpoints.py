"""Problem files and checkpoints: what is read, what is stripped, and one clear error for everything else."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "analysis"))

from checkpoints import load_checkpoint
from command import InputError, labels, replacing, to_json
from problems import load_problem, to

from gradcond.curvature import Hessian

PROBLEM = """
import torch
from torch import nn
def build_model(): return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
def load_data(): return [(torch.randn(4, 3), torch.zeros(4, 1)), (torch.randn(1, 3), torch.zeros(1, 1))]
loss_fn = nn.MSELoss()
"""


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))


@pytest.fixture
def problem_file(tmp_path):
    path = tmp_path / "problem.py"
    path.write_text(PROBLEM)
    return path


def saved(tmp_path: Path, content: object) -> Path:
    torch.save(content, tmp_path / "last.pt")
    return tmp_path / "last.pt"


def assert_error(words, function, *args, **options):
    """The call raises InputError with every word in its one line."""
    with pytest.raises(InputError) as caught:
        function(*args, **options)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def test_a_problem_file_gives_model_data_and_loss(problem_file):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    problem = load_problem(problem_file)
    model, batches = problem.build_model(), problem.load_data()
    assert problem.loss_fn(model(batches[0][0]), batches[0][1]).ndim == 0
    assert [len(target) for _, target in batches] == [4, 1]
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are used
    assert torch.equal(problem.load_data()[0][0], batches[0][0])  # a shuffle is the same at every reading
    assert not torch.equal(problem.load_data(seed=1)[0][0], batches[0][0])


def test_a_problem_file_imports_its_own_sibling(tmp_path):
    for folder, number in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "common.py").write_text(f"number = {number}")
        (tmp_path / folder / "problem.py").write_text(f"{PROBLEM}\nimport common\nnumber = common.number")
    path = list(sys.path)
    numbers = [load_problem(tmp_path / folder / "problem.py").module.number for folder in ("one", "two")]
    assert numbers == [1, 2]
    assert sys.path == path and "common" not in sys.modules


def test_a_sibling_imported_late_is_found(problem_file):
    (problem_file.parent / "late.py").write_text("from torch import nn\nmodel = nn.Linear(1, 1)")
    problem_file.write_text(f"{PROBLEM}\ndef build_model():\n    import late\n    return late.model")
    assert isinstance(load_problem(problem_file).build_model(), nn.Linear)


BAD_PROBLEMS = {
    "syntax": ("x = 1\ndef build_model(:\n", ["problem.py, line 2", "is not Python", "mend"]),
    "raises": ("import no_such_module", ["did not run", "ModuleNotFoundError", "problem.py, line 1"]),
    "exits": ("raise SystemExit('usage: train.py')", ["did not run", "SystemExit: usage", "build_model()"]),
    "no build_model": ("def load_data(): pass\nloss_fn = max", ["must define", "lacks build_model"]),
    "no load_data": ("def build_model(): pass\nloss_fn = max", ["must define", "lacks load_data"]),
    "no loss_fn": ("build_model = load_data = list", ["must define", "lacks loss_fn"]),
    "empty": ("", ["lacks build_model, load_data, loss_fn"]),
    "not callable": (
        f"{PROBLEM}\nbuild_model = torch.zeros(2, 3)",
        ["build_model must be a function", "got a Tensor of shape (2, 3)", "write def build_model(...)"],
    ),
}


@pytest.mark.parametrize("text, words", BAD_PROBLEMS.values(), ids=BAD_PROBLEMS.keys())
def test_a_bad_problem_file_is_told(problem_file, text, words):
    problem_file.write_text(text)
    assert_error([str(problem_file), *words], load_problem, problem_file)


def test_a_missing_problem_file_or_one_that_is_not_python_is_told(tmp_path):
    assert_error(["no problem file at", "no.py", "build_model()"], load_problem, tmp_path / "no.py")
    (tmp_path / "problem.txt").write_text(PROBLEM)
    assert_error(["ends in .py", "problem.txt"], load_problem, tmp_path / "problem.txt")


BAD_DATA = {
    "none": ("[]", ["at least one (input, target) batch", "got none"]),
    "pair of tensors": ("(torch.ones(4, 3), torch.ones(4))", ["got a Tensor of shape (4, 3)", "return [("]),
    "no samples": ("[(torch.ones(0, 3), torch.ones(0))]", ["batch without samples", "leave out empty"]),
    "not iterable": ("3", ["load_data() failed", "TypeError"]),
    "raises": ("open('/no/such/file')", ["load_data() failed", "FileNotFoundError", "problem.py, line 7"]),
}


@pytest.mark.parametrize("data, words", BAD_DATA.values(), ids=BAD_DATA.keys())
def test_bad_data_are_told(problem_file, data, words):
    problem_file.write_text(f"{PROBLEM}def load_data(): return {data}")
    assert_error([str(problem_file), *words], load_problem(problem_file).load_data)


def test_a_loss_that_calls_the_model_takes_batches_of_any_form(problem_file):
    problem_file.write_text(
        f"{PROBLEM}from gradcond.curvature import ModelLoss\n"
        "def load_data(): return [{'x': torch.ones(4, 3), 'y': torch.zeros(4, 1)}]\n"
        "loss_fn = ModelLoss(lambda model, batch: (model(batch['x']) - batch['y']).square().mean())"
    )
    problem = load_problem(problem_file)
    data, model = problem.load_data(), problem.build_model()
    assert Hessian(model, problem.loss_fn, data).loss() == model(torch.ones(4, 3)).square().mean()


def test_a_bad_model_is_told(problem_file):
    problem_file.write_text(f"{PROBLEM}def build_model(): return {{}}")
    assert_error(["must return a torch.nn.Module, got dict"], load_problem(problem_file).build_model)
    problem_file.write_text(f"{PROBLEM}def build_model(): return nn.Linear()")
    assert_error(["build_model() failed: TypeError", "line 7"], load_problem(problem_file).build_model)


LAYOUTS = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "step": 3},
    "state_dict": lambda state: {"state_dict": state},
    "model_state_dict": lambda state: {"model_state_dict": state, "losses": [1.0, 2.0]},
    "DDP": lambda state: {f"module.{key}": value for key, value in state.items()},
    "compiled": lambda state: {"model": {f"_orig_mod.{key}": value for key, value in state.items()}},
    "compiled DDP": lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    "DDP compiled": lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
    "old format": lambda state: state,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_of_a_checkpoint_is_read(tmp_path, name):
    source, model, path = build(), build(), tmp_path / "last.pt"
    torch.save(LAYOUTS[name](source.state_dict()), path, _use_new_zipfile_serialization=name != "old format")
    notes = load_checkpoint(path).load_into(model)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), model.parameters(), strict=True))
    wrapped = "DDP" in name or "compiled" in name
    assert [("stripped" in note, str(path) in note) for note in notes] == [(True, True)] * wrapped


def test_a_prefix_that_is_the_models_own_stays(tmp_path):
    source, model = nn.ModuleDict({"module": build()}), nn.ModuleDict({"module": build()})
    assert load_checkpoint(saved(tmp_path, source.state_dict())).load_into(model) == []
    assert torch.equal(model["module"][0].weight, source["module"][0].weight)


@pytest.mark.parametrize("key", ["optimizer", "optimizer_state_dict"])
def test_the_state_of_the_optimizer_is_found(tmp_path, key):
    model = build()
    state = torch.optim.SGD(model.parameters(), lr=0.5).state_dict()
    found = load_checkpoint(saved(tmp_path, {"model": model.state_dict(), key: state})).optimizer
    assert found is not None and found["param_groups"][0]["lr"] == 0.5
    assert load_checkpoint(saved(tmp_path, model.state_dict())).optimizer is None


class Trainer:
    """An object that only pickle can bring back."""


def test_a_pickled_object_is_refused(tmp_path):
    for content in (build(), {"model": build().state_dict(), "trainer": Trainer()}):
        path = saved(tmp_path, content)
        assert_error([str(path), "could run code", "save {"], load_checkpoint, path)


def test_a_checkpoint_never_runs_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was_here"),)

    assert_error(["could run code"], load_checkpoint, saved(tmp_path, {"model": Attack()}))
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99], ids=str)
@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "old"])
def test_a_truncated_checkpoint_is_told(tmp_path, kept, new_format):
    path = tmp_path / "last.pt"
    torch.save(build().state_dict(), path, _use_new_zipfile_serialization=new_format)
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    assert_error([str(path), "truncated, corrupt", "save it again"], load_checkpoint, path)


@pytest.mark.parametrize(
    "content", [b"loss 0.3\n", b"\x00" * 300, b"PK\x03\x04nothing"], ids=["text", "zero", "zip"]
)
def test_what_is_no_checkpoint_is_told(tmp_path, content):
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    assert_error([str(path), f"{len(content)} bytes", "that torch.save wrote"], load_checkpoint, path)


def test_a_missing_checkpoint_or_a_folder_is_told(tmp_path):
    for path in (tmp_path / "no.pt", tmp_path):
        assert_error([f"no checkpoint file at {path}", "torch.save"], load_checkpoint, path)


STRANGE = {
    "tensor": (torch.ones(2, 3), ["holds a Tensor of shape (2, 3)", "expected a state dict", '"model"']),
    "numbers": ({"epoch": 3, "loss": 0.5}, ["no state dict", '"state_dict"', "the keys epoch, loss"]),
    "empty": ({}, ["no state dict"]),
}


@pytest.mark.parametrize("content, words", STRANGE.values(), ids=STRANGE.keys())
def test_a_checkpoint_without_a_state_dict_is_told(tmp_path, content, words):
    assert_error(words, load_checkpoint, saved(tmp_path, content))


def test_another_architecture_is_told_with_the_first_few_names(tmp_path):
    deep = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    checkpoint = load_checkpoint(saved(tmp_path, deep.state_dict()))
    words = ["another architecture", "4 unexpected (1.weight, 1.bias, 3.weight, ... 1 more)"]
    words += ["0.weight is (3, 3), not (2, 3)", "build_model()"]
    assert_error(words, checkpoint.load_into, model)
    other = load_checkpoint(saved(tmp_path, {**build().state_dict(), "0.bias": 5}))
    assert_error(["1 no tensor (0.bias is a int)", "build_model()"], other.load_into, model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert_error(["4 missing (1.weight"], load_checkpoint(saved(tmp_path, model.state_dict())).load_into, deep)


def test_batches_are_moved_at_any_nesting():
    batch = ({"x": torch.ones(2), "ids": torch.arange(3)}, [torch.ones(1), "name"])
    inputs, rest = to(batch, torch.device("cpu"), torch.float32)
    assert inputs["x"].dtype == torch.float32 and inputs["ids"].dtype == torch.int64
    assert rest[0].dtype == torch.float32 and rest[1] == "name"
    assert to(batch, torch.device("cpu"), None)[0]["x"].dtype == torch.float64


def test_json_is_strict_and_labels_are_short():
    value = {
        "kappa": float("nan"),
        "nodes": torch.tensor([1.0, float("inf")]),
        "n": np.int64(3),
        1: Path("a"),
    }
    assert to_json(value) == {"kappa": None, "nodes": [1.0, None], "n": 3, "1": "a"}
    assert labels([Path("runs/a/last.pt")]) == ["last"]
    assert labels([Path("a/step1.pt"), Path("a/step2.pt")]) == ["step1", "step2"]
    assert labels([Path("a/last.pt"), Path("a/last.pth")]) == ["last.pt", "last.pth"]
    assert labels([Path("a/ck-0.5"), Path("a/ck-1.25")]) == ["ck-0.5", "ck-1.25"]
    assert labels([Path("runs/bnp.old"), Path("runs/sgd.new")], suffix=True) == ["bnp.old", "sgd.new"]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "numbers.json"
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert not path.parent.exists()
    with replacing(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole" and len(list(path.parent.iterdir())) == 1
