"""What the command says when files, modules or the user's code are not what it needs: one line, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

NET = """
import torch
from torch import nn
from types import SimpleNamespace

def net(): return nn.Linear(4, 3)

class Split:
    def __init__(self, targets): self.targets = targets
    def __len__(self): return 12
    def batch(self, indices): return torch.ones(len(indices), 4), self.targets(len(indices))

def data(targets="classes"):
    made = {
        "classes": lambda n: torch.zeros(n, dtype=torch.long),
        "floats": lambda n: torch.zeros(n),
        "many": lambda n: torch.zeros(n, 5, dtype=torch.long),
        "out of range": lambda n: torch.full((n,), 7),
        "broken": lambda n: [][n],
    }[targets]
    return SimpleNamespace(train=Split(made), evaluation=Split(made), tokens_per_sample=1)

class Odd(Split):
    def batch(self, indices):
        kind, self.targets = self.targets, lambda n: torch.zeros(n, dtype=torch.long)
        inputs, targets = Split.batch(self, indices)
        self.targets = kind
        return {"none": None, "numpy": (inputs, targets.numpy()), "three": (inputs, targets, targets),
                "short": (inputs[1:], targets[1:]), "scalar": (inputs, targets[0])}[kind]

def odd(kind):
    return SimpleNamespace(train=Odd(kind), evaluation=None, tokens_per_sample=1)

class Pair(nn.Linear):
    def forward(self, x): return {"output": super().forward(x)}

def pair(): return Pair(4, 3)

def without_batch():
    return SimpleNamespace(train=[1] * 12, evaluation=None, tokens_per_sample=1)
"""
SPEC = """train 1
model "NETMODULE:net"
data "NETMODULE:data" { batch = 4 samples }
loss cross_entropy
run { length = 3 steps, seed = 1 }
optimizer sgd { lr = 0.1 }
"""


def write(folder: Path, text: str = SPEC, module: str = "net_of_test") -> Path:
    (folder / f"{module}.py").write_text(NET)
    (folder / "spec.train").write_text(text.replace("NETMODULE", module))
    return folder / "spec.train"


def trainc(*words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "trainc", *map(str, words)]
    given = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        command, cwd=cwd, env=given, capture_output=True, text=True, timeout=120, check=False
    )


MISTAKES = {
    'data" {': [
        ('data" { targets = "floats",', "error[loss-mismatch]"),
        ('data" { targets = "many",', "outputs float32[4, 3] and targets int64[4, 5]"),
        (
            'data" { targets = "out of range",',
            "a target is the class 7, and the model's output has 3 classes",
        ),
    ],
    ':data"': [
        (
            ':without_batch"',
            "`train`: a sample is int: expected a pair (x, y), or a dict with a field of targets",
        ),
        (':dta"', "did you mean `data`?"),
    ],
    'data" { b': [
        ('odd" { kind = "none", b', "a batch is NoneType: expected a pair"),
        ('odd" { kind = "numpy", b', "a batch is tuple: expected a pair"),
        ('odd" { kind = "three", b', "a batch is tuple: expected a pair"),
        ('odd" { kind = "short", b', "asked for 4 samples and gave targets of shape (3,)"),
        ('odd" { kind = "scalar", b', "asked for 4 samples and gave targets of shape ()"),
    ],
    ':net"': [(':pair"', "the model returned a dict with `output`")],
    'model "net_of_test': [('model "net_of_tst', "there is no module `net_of_tst`")],
}


@pytest.mark.parametrize(
    ("old", "new", "said"), [(old, *both) for old, news in MISTAKES.items() for both in news]
)
def test_a_mistake_is_located_and_has_no_traceback(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    write(tmp_path, SPEC.replace("NETMODULE", "net_of_test").replace(old, new))
    done = trainc("run", "spec.train", "--out", "out", "--plain", cwd=tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
    assert "--> spec.train:" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_class_that_the_graph_does_not_know_is_placed_at_the_loss(tmp_path: Path) -> None:
    text = SPEC.replace('data" {', 'data" { targets = "out of range",')
    write(tmp_path, text + "noise_scale gns on type(Linear) { smooth = 4 steps }\n")
    done = trainc("run", "spec.train", "--out", "out", "--plain", cwd=tmp_path)
    assert done.returncode == 1
    assert (
        "error[loss-mismatch]: a target is the class 7, and the model's output has 3 classes"
        in done.stderr
    )
    assert "--> spec.train:4:" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_users_own_code_shows_its_traceback_from_its_first_frame(tmp_path: Path) -> None:
    write(tmp_path, SPEC.replace('data" {', 'data" { targets = "broken",'))
    done = trainc("run", "spec.train", "--out", "out", "--plain", cwd=tmp_path)
    assert done.returncode == 1
    first, second, *_ = done.stderr.splitlines()
    assert first == "Traceback (most recent call last):"
    assert "net_of_test.py" in second
    assert "IndexError: list index out of range" in done.stderr
    assert "trainc: your code raised IndexError" in done.stderr


def test_modules_beside_the_spec_come_before_installed_ones(tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    installed.mkdir()
    for name in ("beside", "folder"):
        (installed / name).mkdir()
        (installed / name / "__init__.py").write_text("")
        (installed / name / "net.py").write_text("raise SystemExit('the installed one')")
    specs = tmp_path / "project/specs"
    specs.mkdir(parents=True)
    write(specs, module="beside")
    done = trainc("run", "spec.train", "--out", "a", cwd=specs, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    # A folder without __init__.py above the spec, and a file beside the one that is imported.
    (tmp_path / "project/folder").mkdir()
    (tmp_path / "project/folder/net.py").write_text("from helper_of_net import *")
    (tmp_path / "project/helper_of_net.py").write_text(NET)
    (installed / "helper_of_net.py").write_text("raise SystemExit('the installed one')")
    (specs / "spec.train").write_text(SPEC.replace("NETMODULE", "folder.net"))
    done = trainc("run", "spec.train", "--out", "b", cwd=specs, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    # What is only installed is still found, and a message says which file was taken.
    (specs / "spec.train").write_text(SPEC.replace("NETMODULE", "beside.other"))
    done = trainc("plan", "spec.train", cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 2, "there is no such spec here"
    done = trainc("plan", specs / "spec.train", cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 1
    assert "there is no module `beside.other`: `beside` is " in done.stderr
    assert "trainc looked in project/specs and the folders above, in the working" in done.stderr


def test_what_numpy_and_python_draw_for_weights_follows_the_seed(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "net_of_test.py").write_text(
        NET.replace(
            "def net(): return nn.Linear(4, 3)",
            "import numpy, random\n"
            "def net():\n"
            "    made = nn.Linear(4, 3)\n"
            "    made.bias.data += numpy.random.rand() + random.random()\n"
            "    return made",
        )
    )
    for out in ("a", "b"):
        done = trainc("run", "spec.train", "--out", out, "--plain", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    one, two = ((tmp_path / out / "metrics.jsonl").read_bytes() for out in ("a", "b"))
    assert one == two


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "spec.train", "--out", "out", "--accept"], "--accept: it needs `--resume`"),
        (["run", "spec.train", "--out", "o", "--overwrite", "--resume"], "leave out `--resume`"),
        (["run", "none.train", "--out", "out"], "none.train"),
        (["report", "none"], "none"),
    ],
)
def test_a_mistake_in_the_command_line_has_code_2(
    tmp_path: Path, words: list[str], said: str
) -> None:
    write(tmp_path)
    done = trainc(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.replace("│", " ").split())


def test_one_of_several_processes_that_nothing_launched_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    done = trainc("run", "spec.train", "--out", "out", cwd=tmp_path, WORLD_SIZE="2")
    assert done.returncode == 1
    assert done.stderr.startswith("trainc: WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT are")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_pass_and_a_missing_checkpoint_are_one_line(tmp_path: Path) -> None:
    write(tmp_path)
    done = trainc("run", "spec.train", "--out", "out", "--without", "fuse_los", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "trainc: there is no pass `fuse_los`: did you mean `fuse_loss`?\n"
    done = trainc("run", "spec.train", "--out", "out", "--resume", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("trainc: out has no checkpoint to resume from")


@pytest.mark.parametrize("kind", ["text", "pipe", "empty folder", "missing", "other weights"])
def test_weights_that_are_none_are_named_at_the_clause(tmp_path: Path, kind: str) -> None:
    start = tmp_path / "start.safetensors"
    if kind == "text":
        start.write_text("no weights")
    elif kind == "pipe":
        os.mkfifo(start)
    elif kind == "empty folder":
        start.mkdir()
    elif kind == "other weights":
        save_file({"weight": torch.ones(2)}, start)
    write(tmp_path, SPEC.replace("seed = 1", 'seed = 1, start = "start.safetensors"'))
    done = trainc("run", "spec.train", "--out", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "the weights in start.safetensors cannot be loaded into this model" in done.stderr
    assert "--> spec.train:5:" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_check_that_nobody_reads_is_quiet(tmp_path: Path) -> None:
    (tmp_path / "spec.train").write_text("".join(f"loss l{n}\n" for n in range(90)))
    script = f"{sys.executable} -P -m trainc check spec.train | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.returncode in (1, 141)
