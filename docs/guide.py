"""The tables of docs/adding-a-construct.md, made from the docstrings of the classes that a construct meets."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

from trainc.compiler.catalog import catalog
from trainc.compiler.lower.adapting import Adapting
from trainc.compiler.lower.lowering import Lowering
from trainc.dsl.reading.construct import Construct

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/adding-a-construct.md"
SHOWN = 2
"""The largest number of constructs that a row names."""


def guide_page() -> str:
    """Return the page with its tables written anew; what stands outside the markers is written by hand."""
    text = PAGE.read_text(encoding="utf-8")
    tables = {
        "parts": part_rows(),
        "adapting": adapting_rows(),
        "mechanisms": mechanism_rows(),
    }
    for name, rows in tables.items():
        start, stop = f"<!-- {name}: written by `make docs` -->\n", f"<!-- end of {name} -->\n"
        before, _, rest = text.partition(start)
        text = before + start + "\n".join([*rows, ""]) + stop + rest.partition(stop)[2]
    return text


def part_rows() -> Iterator[str]:
    """Yield the table of what a construct declares, and of the methods that constructs override."""
    yield "| part | what comes of it |\n|---|---|"
    for name, text in attribute_docstrings(Construct).items():
        yield f"| `{name}` | {_cell(text)} |"
    for name, found in vars(Construct).items():
        function = found.__func__ if isinstance(found, classmethod) else found
        if isinstance(function, FunctionType) and not name.startswith("_") and _overridden(name):
            yield f"| `{_call('', name, function)}` | {_cell(_first_line(function))} |"


def mechanism_rows() -> Iterator[str]:
    """Yield one table for each section of `Lowering` and its bases, those that are asked first in front."""
    uses = used_by()
    for title, names in sections().items():
        yield f"\n**{title}**\n\n| call | for | shown by |\n|---|---|---|"
        for name in names:
            yield f"{_row(Lowering, name)} {', '.join(uses.get(name, [])[:SHOWN])} |"


def adapting_rows() -> Iterator[str]:
    """Yield the table of what `adapt` may call."""
    yield "| call | for |\n|---|---|"
    yield from (_row(Adapting, name) for name in vars(Adapting) if not name.startswith("_"))


def _row(cls: type, name: str) -> str:
    """Return the row of a method or property of a class that constructs are given as `to`."""
    found = inspect.getattr_static(cls, name)
    function = found.fget if isinstance(found, property) else found
    call = _call("to.", name, None if isinstance(found, property) else function)
    text = f"{_first_line(function)}{_bases_to_write(function)}"
    return f"| `{call}` | {_cell(text)} |"


def sections() -> dict[str, list[str]]:
    """Return the public names of `Lowering` by the section comment above them, those of its bases first."""
    found: dict[str, list[str]] = {}
    for cls in reversed([cls for cls in Lowering.__mro__ if cls is not object]):
        lines, _ = inspect.getsourcelines(cls)
        title = _first_line(cls).rstrip(".")
        for above, line, below in zip(lines, lines[1:], lines[2:], strict=False):
            heading = re.fullmatch(r"    # ([^\n]+?)\.?\n", line)
            if heading and not above.strip() and not below.strip():
                title = heading[1]
            elif defined := re.match(r"    def ([a-z]\w*)\(", line):
                found.setdefault(title, []).append(defined[1])
    return found


def used_by() -> dict[str, list[str]]:
    """Return links to the constructs that ask for each mechanism, by its name; to tests where there is none."""
    found: dict[str, list[str]] = {}
    for cls in sorted(catalog().values(), key=lambda cls: cls.heading()):
        file = _file(cls.__module__)
        for name in sorted(_asked(file)):
            found.setdefault(name, []).append(f"[{cls.heading()}](../{file})")
    constructs = set(found)
    for path in sorted((ROOT / "tests/compiler").glob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        for name in sorted(_asked(file) - constructs):
            found.setdefault(name, []).append(f"[{path.name}](../{file})")
    return found


def _asked(file: str) -> set[str]:
    """Return the names after `to.` in a construct's file, outside `adapt`, and in the private files that it imports."""
    found = set()
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    adapting = {
        inside
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "adapt"
        for inside in ast.walk(node)
    }
    for node in {*ast.walk(tree)} - adapting:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found |= {node.attr} if node.value.id == "to" else set()
        if isinstance(node, ast.ImportFrom) and re.search(
            r"\.constructs\.\w+\._", node.module or ""
        ):
            found |= _asked(_file(str(node.module)))
    return found


def _file(module: str) -> str:
    """Return where a module of ours is in the checkout."""
    return module.removeprefix("trainc.").replace(".", "/") + ".py"


def attribute_docstrings(cls: type) -> dict[str, str]:
    """Return the docstrings below the attributes of a class, by name."""
    (tree,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                found[node.target.id] = " ".join(text.value.split())
    return found


def _overridden(name: str) -> bool:
    """Say whether some construct has its own version of a method."""
    bases = {base for cls in catalog().values() for base in cls.__mro__}
    return any(name in vars(base) for base in bases - {*Construct.__mro__})


def _call(prefix: str, name: str, function: FunctionType | None) -> str:
    if function is None:
        return f"{prefix}{name}"
    _, *parameters = inspect.signature(function).parameters.values()
    return f"{prefix}{name}({', '.join(map(_parameter, parameters))})"


def _parameter(parameter: inspect.Parameter) -> str:
    star = "*" * (parameter.kind == parameter.VAR_POSITIONAL)
    default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
    return f"{star}{parameter.name}{default}"


def _first_line(documented: object) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def _bases_to_write(function: FunctionType) -> str:
    """Say which classes of ours a construct writes for a mechanism's arguments, and what functions are called with."""
    words = []
    for annotation in (text for name, text in function.__annotations__.items() if name != "return"):
        hint = function.__globals__.get(annotation)
        if called_with := re.match(r"Callable\[\[(\w+)\]", annotation):
            given = function.__globals__[called_with[1]]
            if given.__module__.startswith("trainc."):
                words.append(f" Its argument is a {_link(given)}.")
        elif getattr(hint, "_is_protocol", False):
            words.append(f" Implement {_link(hint)}.")
        elif isinstance(hint, type) and (inspect.isabstract(hint) or hint.__subclasses__()):
            words.append(f" Subclass {_link(hint)}.")
    return "".join(words)


def _link(cls: Any) -> str:
    return f"[`{cls.__name__}`](../{_file(cls.__module__)})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
