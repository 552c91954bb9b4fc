"""What `trainc check` loads: the constructs that a spec names, and nothing that only a run needs."""

import json
import subprocess
import sys

from trainc.compiler.catalog import catalog

LOADED = """
import json, sys
from trainc.compiler.catalog import check
loaded = []
for text in json.load(sys.stdin):
    assert check(text).spec, text
    loaded.append(list(sys.modules))
print(json.dumps(loaded))
"""

# A construct's file holds its actions too, and so needs their base classes: short files that import only each other.
BASE_OF_ACTIONS = {
    "trainc.runtime",
    "trainc.runtime.step",
    "trainc.runtime.storage",
    "trainc.runtime.storage.form",
} | {
    f"trainc.runtime.step.{name}"
    for name in ("action", "around", "exchange", "gradients", "observer", "updates")
}
# What a construct calls to draw factors from figures: functions of numbers.
BASE_OF_ACTIONS |= {f"trainc.runtime.factors{file}" for file in ("", ".maps", ".noise", ".units")}


def loaded(*texts: str) -> list[set[str]]:
    """Check the texts one after another in one new process; return the modules loaded after each."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED],
        input=json.dumps(texts),
        text=True,
        check=True,
        capture_output=True,
    )
    return [set(modules) for modules in json.loads(done.stdout)]


def test_only_the_constructs_that_a_spec_names_are_loaded() -> None:
    here = "trainc.compiler.constructs."
    (modules,) = loaded("loss cross_entropy\noptimizer sgd { lr = 0.1 }")
    constructs = {name.removeprefix(here) for name in modules if name.startswith(here)}
    assert constructs == {
        "loss", "loss._base", "loss.cross_entropy", "optimizer", "optimizer._base", "optimizer.sgd",
    }  # fmt: skip


def test_checking_loads_nothing_that_only_a_run_needs() -> None:
    texts = {" ".join(key): construct.usage for key, construct in catalog().items()}
    for key, modules in zip(texts, loaded(*texts.values()), strict=True):
        run_time = {m for m in modules if m.startswith(("trainc.runtime", "trainc.kernels"))}
        assert run_time <= BASE_OF_ACTIONS, key
        assert not {"torch", "numpy", "typer", "rich"} & modules, key


COMMAND = """
import sys
from trainc.cli.entry import main
try:
    main()
except SystemExit as done:
    assert not done.code
print(*sys.modules)
"""


def test_the_command_loads_no_framework_and_nothing_that_explains_mistakes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "check", "-", "--set", "rate=0.1", "--format=text"],
        input="let rate = 1\noptimizer sgd { lr = rate }",
        text=True,
        check=True,
        capture_output=True,
    )
    modules = set(done.stdout.splitlines()[-1].split())
    assert "trainc.dsl.syntax.parser" in modules
    unwanted = {"typer", "click", "rich", "torch", "numpy"}
    unwanted |= {
        "trainc.cli.app",
        "trainc.dsl.text.machine_formats",
        "trainc.dsl.syntax.syntax_errors",
    }
    assert not unwanted & modules
