"""The layering, as a table. Reading this file is reading the architecture."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each package may take from outside, beside Python's own library.
LIBRARIES = {
    "dsl": {"lark", "pydantic"},
    "kernels": {"torch", "triton"},
    "runtime": {"torch", "numpy", "scipy", "safetensors", "rich", "matplotlib"},
    "compiler": {"torch", "pydantic", "safetensors"},
}
# The rooms from the ground up, and which rooms each may import: only rooms above it in this table. Imports inside
# functions and under TYPE_CHECKING count. A package's own files (`compiler/catalog.py`) are a room of its name.
ROOMS = {
    room: frozenset(allowed.split())
    for room, allowed in {
        "dsl/text": "",
        "dsl/values": "dsl/text",
        "dsl/syntax": "dsl/text",
        "dsl/reading": "dsl/text dsl/values dsl/syntax",
        "dsl/printing": "dsl/text dsl/values dsl/syntax dsl/reading",
        "dsl/resolve": "dsl/text dsl/values dsl/syntax dsl/reading",
        "kernels/library": "",
        "kernels/norm": "kernels/library",
        "kernels/batch_norm": "kernels/library",
        "kernels/layer": "kernels/library",
        "kernels/loss": "kernels/library",
        "kernels/noise": "kernels/library",
        "kernels/parameter": "kernels/library",
        "kernels": "",  # operators are found on disk
        "runtime/schedule": "",
        "runtime/storage": "kernels/library",
        "runtime/data": "runtime/storage",
        "runtime/device": "runtime/data",
        "runtime/sources": "runtime/storage runtime/data",
        "runtime/processes": "",
        "runtime/memory": "",
        "runtime/soundness": "runtime/processes",
        "runtime/vector_optimizer": "",
        "runtime/torch_optimizer": "runtime/schedule runtime/storage runtime/processes",
        "runtime/step": (
            "runtime/schedule runtime/storage runtime/data runtime/processes runtime/soundness "
            "runtime/torch_optimizer"
        ),
        "runtime/rules": "runtime/schedule runtime/storage runtime/step",
        "runtime/companion": "runtime/storage runtime/data runtime/processes runtime/torch_optimizer runtime/step",
        "runtime/mask": (
            "kernels/parameter runtime/storage runtime/processes runtime/schedule runtime/soundness "
            "runtime/torch_optimizer runtime/step"
        ),
        "runtime/factors": "runtime/schedule runtime/storage runtime/processes runtime/step",
        "runtime/report": "runtime/storage",
        "runtime/fits": "runtime/report",
        "runtime/noise_scale": "runtime/storage runtime/processes runtime/step runtime/report",
        "runtime/run": (
            "runtime/schedule runtime/storage runtime/data runtime/device runtime/sources runtime/processes "
            "runtime/memory runtime/soundness runtime/step runtime/report"
        ),
        "compiler": "dsl/text dsl/reading dsl/resolve",
        "compiler/structure": "dsl/text kernels/parameter",
        "compiler/model": "dsl/text dsl/values dsl/resolve runtime/storage runtime/data compiler/structure",
        "compiler/bind": "compiler dsl/text dsl/values dsl/reading dsl/resolve runtime/schedule compiler/model",
        "compiler/method": (
            "dsl/text runtime/schedule runtime/processes runtime/soundness runtime/step runtime/companion runtime/mask "
            "compiler compiler/model runtime/data kernels/noise"
        ),
        "compiler/graph": "compiler runtime/data compiler/method",
        "compiler/lower": (
            "dsl/text dsl/values dsl/reading dsl/resolve runtime/schedule runtime/storage runtime/processes "
            "runtime/soundness runtime/step runtime/rules runtime/companion runtime/mask compiler compiler/structure "
            "compiler/model compiler/bind compiler/method"
        ),
        "compiler/layers": (
            "compiler kernels/norm kernels/batch_norm kernels/layer compiler/model "
            "compiler/method compiler/graph"
        ),
        "compiler/patterns": "compiler/graph",
        "compiler/passes": (
            "compiler kernels/norm kernels/loss kernels/noise compiler/method compiler/graph compiler/layers "
            "compiler/patterns"
        ),
        "compiler/per_example": (
            "compiler dsl/reading runtime/schedule runtime/data runtime/processes runtime/soundness runtime/step "
            "compiler/structure compiler/model compiler/method compiler/layers"
        ),
        "compiler/constructs": (
            "dsl/text dsl/values dsl/reading kernels/loss kernels/noise kernels/parameter runtime/schedule "
            "runtime/sources runtime/storage runtime/data runtime/soundness runtime/processes runtime/step "
            "runtime/companion runtime/mask runtime/factors runtime/vector_optimizer "
            "runtime/report runtime/noise_scale compiler compiler/structure compiler/model compiler/bind "
            "compiler/method compiler/lower compiler/layers"
        ),
        "compiler/plan": (
            "dsl/text dsl/values dsl/reading kernels/layer runtime/schedule runtime/storage runtime/memory compiler "
            "compiler/model "
            "compiler/bind compiler/method compiler/passes runtime/step"
        ),
        "compiler/replay": "kernels/library runtime/memory compiler compiler/model compiler/graph compiler/patterns",
        "compiler/execution": (
            "kernels/noise runtime/schedule runtime/storage runtime/data runtime/processes "
            "runtime/memory runtime/soundness runtime/step runtime/mask compiler compiler/structure compiler/model "
            "compiler/method compiler/graph compiler/replay compiler/layers compiler/passes compiler/per_example"
        ),
        "compiler/program": (
            "runtime/schedule runtime/storage runtime/data runtime/processes runtime/memory runtime/soundness "
            "runtime/step runtime/companion runtime/run compiler compiler/structure compiler/model compiler/method "
            "compiler/graph compiler/replay compiler/layers compiler/per_example compiler/plan compiler/execution"
        ),
        "compiler/driver": (
            "compiler/method dsl/text dsl/values dsl/reading dsl/resolve runtime/schedule runtime/storage runtime/data "
            "runtime/device runtime/processes runtime/memory runtime/torch_optimizer runtime/step runtime/rules "
            "runtime/report runtime/run compiler compiler/structure compiler/model compiler/bind compiler/graph "
            "compiler/lower compiler/passes compiler/plan compiler/execution compiler/program"
        ),
        "compiler/influence": (
            "dsl/values dsl/reading dsl/resolve runtime/storage runtime/data runtime/device runtime/memory "
            "runtime/soundness compiler compiler/structure compiler/model compiler/program compiler/driver"
        ),
        "compiler/learn": (
            "dsl/text dsl/values dsl/resolve runtime/storage runtime/data runtime/run runtime/step compiler/model "
            "compiler/bind compiler/driver"
        ),
    }.items()
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

LAYERED = [path for layer in LIBRARIES for path in sorted((ROOT / layer).rglob("*.py"))]
EVERYTHING = [
    path
    for folder in (*LIBRARIES, "trainc", "examples", "tests", "benchmarks")
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


def room_of(path: Path) -> str:
    """Return the room of a file, given from the repository's root: at most two folders."""
    return "/".join(path.parts[:-1][:2])


def room_imported(name: str) -> str | None:
    """Return the room that `trainc.dsl.text.source.Span` lies in; None for what is not in a room."""
    package, *inside = name.removeprefix("trainc.").split(".")
    if not name.startswith("trainc.") or package not in LIBRARIES:
        return None
    is_room = inside and (ROOT / package / inside[0]).is_dir()
    return f"{package}/{inside[0]}" if is_room else package


def arrows(source: str, room: str) -> set[str]:
    """Return the other rooms that a file of `room` imports, wherever in the file it does."""
    names = {name for node in ast.walk(ast.parse(source)) for name in imports(node)}
    return {found for name in names if (found := room_imported(name))} - {room}


def foreign(source: str, package: str) -> set[str]:
    """Return what a file of `package` imports that neither stands in a room nor is allowed to it."""
    allowed = LIBRARIES[package] | set(sys.stdlib_module_names)
    if "pydantic" in allowed:
        allowed.add("pydantic_core")  # the same project; its types appear in pydantic's interfaces
    found = {name for node in ast.walk(ast.parse(source)) for name in imports(node)}
    return {
        n
        for n in found
        if not room_imported(n) and not any(f"{n}.".startswith(f"{prefix}.") for prefix in allowed)
    }


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
def test_a_file_imports_only_what_its_room_may(path: Path) -> None:
    room = room_of(path.relative_to(ROOT))
    assert arrows(path.read_text(), room) - ROOMS.get(room, frozenset()) == set()
    assert foreign(path.read_text(), room.partition("/")[0]) == set()


def test_the_table_has_no_circle() -> None:
    above: set[str] = set()
    for room, allowed in ROOMS.items():
        assert allowed <= above, f"{room} may import only rooms above it"
        above.add(room)


def test_the_table_names_the_rooms_on_disk() -> None:
    on_disk = {room_of(path.relative_to(ROOT)) for path in LAYERED if path.name != "__init__.py"}
    assert set(ROOMS) == on_disk


def test_the_page_lists_the_rooms_in_the_order_of_the_table() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    rows = dict(re.findall(r"^\| `([\w/]+)` \| ([^|]+) \|$", page, re.MULTILINE))
    docstrings = {
        room: ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text()))
        for room in ROOMS
    }
    assert list(rows.items()) == list(docstrings.items())


def test_the_page_names_the_libraries_of_the_packages() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)/` \| `trainc\.\w+` \|.*\| ([^|]+) \|$", page, re.MULTILINE)
    names = {
        package: set(re.findall(r"(?<![`\w])[a-z]+(?![`\w])", cell.partition(". ")[0]))
        for package, cell in rows
    }
    assert names == LIBRARIES


@pytest.mark.parametrize("room", ROOMS)
def test_every_permission_is_used(room: str) -> None:
    files = [path for path in LAYERED if room_of(path.relative_to(ROOT)) == room]
    assert ROOMS[room] - {to for path in files for to in arrows(path.read_text(), room)} == set()


@pytest.mark.parametrize("room", [room for room in ROOMS if "/" in room])
def test_a_room_is_small_enough_to_be_read_at_a_glance(room: str) -> None:
    for folder in {p.parent for p in LAYERED if room_of(p.relative_to(ROOT)) == room}:
        assert len([p for p in folder.glob("*.py") if p.name != "__init__.py"]) <= 14, folder


@pytest.mark.parametrize("path", named(EVERYTHING))
def test_imports_are_absolute(path: Path) -> None:
    names = {name for node in ast.walk(ast.parse(path.read_text())) for name in imports(node)}
    assert not [name for name in names if name.startswith(".")]


@pytest.mark.parametrize("path", named([p for glob in TORCH_FREE for p in ROOT.glob(glob)]))
def test_what_check_loads_imports_torch_late(path: Path) -> None:
    assert early_torch(ast.parse(path.read_text()).body) == set()


@pytest.mark.parametrize("path", named(LAYERED))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    functions = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert len(text.splitlines()) <= 350
    assert {name: length for name, length in lengths.items() if length > 60} == {}


@pytest.mark.parametrize(
    ("room", "source", "wrong"),
    [
        ("dsl/text", "from trainc.dsl.values import durations", "dsl/values"),
        (
            "dsl/values",
            "def f():\n    from trainc.runtime.schedule import clock",
            "runtime/schedule",
        ),
        ("dsl/text", "if TYPE_CHECKING:\n    import trainc.dsl.syntax.ast", "dsl/syntax"),
        ("kernels/norm", "from trainc.kernels import operators", "kernels"),
        ("runtime/step", "from trainc.compiler.catalog import catalog", "compiler"),
    ],
)
def test_an_import_of_a_room_below_would_be_noticed(room: str, source: str, wrong: str) -> None:
    assert arrows(source, room) - ROOMS[room] == {wrong}


@pytest.mark.parametrize(
    ("package", "source", "wrong"),
    [
        ("dsl", "import torch", "torch"),
        ("dsl", "import trainc", "trainc"),
        ("kernels", "from torchvision.ops import nms", "torchvision.ops.nms"),
        ("compiler", "import trainc.cli", "trainc.cli"),
        ("compiler", "import kernels", "kernels"),
        ("compiler", "from . import catalog", "..catalog"),
    ],
)
def test_an_import_from_outside_would_be_noticed(package: str, source: str, wrong: str) -> None:
    assert foreign(source, package) == {wrong}


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
