"""The layering, as a table. Reading this file is reading the architecture."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "dsl": {"lark", "pydantic"},
    "kernels": {"torch", "triton"},
    "runtime": {"trainc.kernels", "torch", "numpy", "safetensors", "rich", "matplotlib"},
    "compiler": {
        "trainc.dsl",
        "trainc.runtime",
        "trainc.kernels",
        "torch",
        "pydantic",
        "safetensors",
    },
}
# Loaded by `trainc check`, which starts in a blink: torch only inside functions.
TORCH_FREE = (
    "dsl/**/*.py",
    "compiler/catalog.py",
    "compiler/constructs/**/*.py",
    "trainc/__*__.py",
    "trainc/cli/app.py",
    "trainc/cli/check.py",
    "trainc/cli/fmt.py",
    "trainc/cli/explain.py",
)

LAYERED = [path for layer in MAY_IMPORT for path in sorted((ROOT / layer).rglob("*.py"))]
EVERYTHING = [
    path
    for folder in (*MAY_IMPORT, "trainc", "examples", "tests", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def named(paths: list[Path]) -> list[object]:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


def imports(node: ast.AST) -> Iterator[str]:
    """Yield what an import statement names; a relative one starts with dots."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def climbs(source: str, layer: str) -> set[str]:
    """Return the imports that a file of `layer` may not have, wherever in the file they are."""
    allowed = MAY_IMPORT[layer] | {f"trainc.{layer}"} | set(sys.stdlib_module_names)
    if "pydantic" in allowed:
        allowed.add("pydantic_core")  # the same project; its types appear in pydantic's interfaces
    found = {name for node in ast.walk(ast.parse(source)) for name in imports(node)}
    return {n for n in found if not any(f"{n}.".startswith(f"{prefix}.") for prefix in allowed)}


def early_torch(body: list[ast.stmt]) -> set[str]:
    """Return the imports that load torch with the module, type checkers' imports aside."""
    found = set()
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(statement, ast.If) and ast.unparse(statement.test).endswith("TYPE_CHECKING"):
            found |= early_torch(statement.orelse)
            continue
        found |= set(imports(statement))
        blocks = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
        blocks += [handler.body for handler in getattr(statement, "handlers", [])]
        for block in blocks:
            found |= early_torch(block)
    return {name for name in found if f"{name}.".startswith("torch.")}


def run(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a Python where importing torch fails, and says who asked."""
    blocked = f"import sys; sys.modules['torch'] = None\n{program}"
    command = [sys.executable, "-P", "-c", blocked]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", named(LAYERED))
def test_imports_point_down(path: Path) -> None:
    assert climbs(path.read_text(), path.relative_to(ROOT).parts[0]) == set()


@pytest.mark.parametrize("path", named(EVERYTHING))
def test_imports_are_absolute(path: Path) -> None:
    names = {name for node in ast.walk(ast.parse(path.read_text())) for name in imports(node)}
    assert not [name for name in names if name.startswith(".")]


@pytest.mark.parametrize("path", named([p for glob in TORCH_FREE for p in ROOT.glob(glob)]))
def test_what_check_loads_imports_torch_late(path: Path) -> None:
    assert early_torch(ast.parse(path.read_text()).body) == set()


def test_the_table_is_the_one_in_the_documentation() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)/` \| `trainc\.\w+` \|.*\| ([^|]+) \|$", text, re.MULTILINE)
    assert {
        layer: set(re.findall(r"[\w.]*\w", cell.partition(". ")[0])) for layer, cell in rows
    } == MAY_IMPORT


@pytest.mark.parametrize(
    ("layer", "source", "wrong"),
    [
        ("dsl", "import torch", "torch"),
        ("dsl", "def f():\n    from trainc.runtime import clock", "trainc.runtime.clock"),
        ("dsl", "import trainc", "trainc"),
        ("kernels", "from trainc import dsl", "trainc.dsl"),
        ("kernels", "from torchvision.ops import nms", "torchvision.ops.nms"),
        (
            "runtime",
            "from trainc.compiler.program.program import Program",
            "trainc.compiler.program.program.Program",
        ),
        ("compiler", "import trainc.cli", "trainc.cli"),
        ("compiler", "import kernels", "kernels"),
        ("compiler", "from . import catalog", "..catalog"),
    ],
)
def test_an_import_that_climbs_would_be_noticed(layer: str, source: str, wrong: str) -> None:
    assert climbs(source, layer) == {wrong}


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "from torch import nn",
        "class C:\n    import torch.nn",
        "try:\n    import torch\nexcept ImportError:\n    pass",
        "try:\n    pass\nexcept ImportError:\n    import torch",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import torch",
    ],
)
def test_an_early_torch_would_be_noticed(source: str) -> None:
    assert early_torch(ast.parse(source).body)


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    import torch",
        "class C:\n    def f(self):\n        import torch",
        "if TYPE_CHECKING:\n    import torch",
        "import torchless",
    ],
)
def test_a_late_torch_is_fine(source: str) -> None:
    assert not early_torch(ast.parse(source).body)


SPEC = """train 1
model "nowhere.at:all"
data  "nowhere.at:all" { batch = 8 samples }
loss  cross_entropy
run   { length = 10 steps }
optimizer adamw { lr = 1e-3 }
"""


def test_checking_a_spec_never_loads_torch() -> None:
    done = run(
        "import trainc\n"
        "assert len([*trainc.catalog().values()]) > 10\n"
        f"assert trainc.check({SPEC!r}).spec\n"
        "assert trainc.Spec and trainc.Clause and trainc.SpecError and dir(trainc)\n"
        "import trainc.cli.app"
    )
    assert done.returncode == 0, done.stderr


def test_loading_torch_would_be_noticed() -> None:
    assert run("import trainc.cli.app, torch").returncode != 0
