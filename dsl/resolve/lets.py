"""`let`: named values, put in the place of their names before fields are read."""

from __future__ import annotations

from collections.abc import Iterable

from trainc.dsl.reading.constants import Unreadable
from trainc.dsl.syntax import ast
from trainc.dsl.syntax.ast import Node
from trainc.dsl.syntax.parser import parse_expression
from trainc.dsl.text.diagnostic import Diagnostics, Label, repetition
from trainc.dsl.text.nearest import suggest
from trainc.dsl.text.source import Source
from trainc.dsl.text.vocabulary import BOOLEANS, BUILT_IN, SELECTOR_FUNCTIONS, SELECTOR_WORDS
from trainc.dsl.values.functions import FUNCTIONS

MAX_SIZE = 5_000
MAX_DEPTH = 100
MAX_LEVELS = 230
"""Levels of a value once its names are replaced, those of chains included: pydantic writes no more than 255."""
_RESERVED = {*BUILT_IN, *FUNCTIONS, *SELECTOR_FUNCTIONS, *SELECTOR_WORDS, *BOOLEANS, "none"}


class Lets:
    """The lets of a spec, after `--set` replaced the values of some."""

    def __init__(self) -> None:
        self.values: dict[str, Node] = {}
        self.names: dict[str, ast.Ident] = {}
        self.overridden: dict[str, Node] = {}
        self.used: set[str] = set()
        self.broken: set[str] = set()
        self.refused: set[str] = set()
        """Names that no `let` can have: their uses are no second mistake."""
        self.found = Diagnostics()
        self._expanded: dict[str, Node] = {}
        self._size: dict[str, tuple[int, int]] = {}

    def define(self, let: ast.Let) -> None:
        """Add one `let` statement."""
        name = let.name.id
        if name in _RESERVED or "." in name:
            message = (
                f"the name `{name}` is reserved by the language: choose another name"
                if name in _RESERVED
                else f"the name of a `let` cannot contain a dot: `{name}`"
            )
            self.found.report("reserved-name", message, Label(let.name.span))
            self.refused.add(name)
        elif name in self.names:
            labels = repetition(let.name.span, self.names[name].span)
            self.found.report("duplicate-let", f"`{name}` is defined twice", *labels)
        else:
            self.names[name], self.values[name] = let.name, let.value

    def override(self, settings: Iterable[str], lost: Iterable[str] = ()) -> None:
        """Replace values by `name=value` texts of the command line."""
        for setting in settings:
            source = Source("--set", setting)
            name, equals, text = setting.partition("=")
            name = name.strip()
            place = Label(source.span(0, max(1, len(setting.partition("=")[0].rstrip()))))
            if not equals:
                place = place.replace(text="expected `name=value`")
                self.found.report("syntax", "`--set` needs a name and a value", place)
            elif name not in self.values:
                if name in lost or "*" in lost:
                    continue
                message, help = f"the spec has no `let {name}`", suggest(name, self.values)
                known = f"known lets: {', '.join(f'`{n}`' for n in self.values) or 'none'}"
                self.found.report("unknown-let", message, place, help=help, notes=(known,))
            else:
                node, problems = parse_expression(source, len(setting) - len(text))
                self.found += problems
                if node is None:
                    self.broken.add(name)
                else:
                    self.values[name] = self.overridden[name] = node

    def check_definitions(self) -> None:
        """Report lets that are defined by themselves, and lets whose value is too large."""
        for name in self.values:
            self._measure(name, {})

    def _measure(self, name: str, chain: dict[str, ast.Ident]) -> tuple[int, int]:
        """Return the size and depth of a let once its names are replaced."""
        if name in self._size or name in self.broken:
            return self._size.get(name, (1, 1))
        size, depth = 0, 0
        todo: list[tuple[Node, int]] = [(self.values[name], 1)]
        while todo:
            node, level = todo.pop()
            size, depth = size + 1, max(depth, level)
            if isinstance(node, ast.Ident) and node.id in self.values:
                if node.id == name or node.id in chain:
                    self._cycle(name, node)
                    return (1, 1)
                inner = (
                    self._measure(node.id, {**chain, name: node})
                    if len(chain) < MAX_DEPTH
                    else (0, MAX_DEPTH)
                )
                size, depth = size + inner[0], max(depth, level + inner[1])
            below = expandable(node)
            for child in below:
                # What a chain such as `a | b | c` has to its left is no level.
                chained = isinstance(node, ast.Infix) and child is below[0]
                todo.append(
                    (child, level if chained and isinstance(child, ast.Infix) else level + 1)
                )
        if (size > MAX_SIZE or depth > MAX_DEPTH) and name not in self.broken:
            self.broken.add(name)
            message = f"`{name}` has more than {MAX_SIZE:,} parts or {MAX_DEPTH} levels"
            self.found.report("too-large", message, Label(self.names[name].span))
            return (1, 1)
        self._size[name] = (size, depth)
        return size, depth

    def _cycle(self, name: str, back: ast.Ident) -> None:
        if not self.broken & {name, back.id}:
            use = Label(back.span, f"`{back.id}` is used here")
            definition = Label(self.names[back.id].span, f"`{back.id}` is defined here")
            message = f"the definition of `{back.id}` uses `{back.id}` itself"
            self.found.report("let-cycle", message, use, definition)
        self.broken |= {name, back.id}

    def expand(self, node: Node) -> Node:
        """Return a node with every let's name replaced by its value; raises Unreadable where that is too deep."""
        new = self._expand(node)
        if new is not node and _levels(new) > MAX_LEVELS:
            message = f"with the values of its names this has more than {MAX_LEVELS} levels"
            raise Unreadable(node, "", "too-deep", None, message)
        return new

    def _expand(self, node: Node) -> Node:
        if isinstance(node, ast.Ident):
            if node.id not in self.values or node.id in self.broken:
                return node
            self.used.add(node.id)
            if node.id not in self._expanded:
                self._expanded[node.id] = self._expand(self.values[node.id])
            return self._expanded[node.id]
        if not expandable(node):
            return node
        match node:
            case ast.Apply(_, arguments):
                new = tuple(a.replace(value=self._expand(a.value)) for a in arguments)
                return node.replace(arguments=new)
            case ast.Items(items):
                return node.replace(items=tuple(map(self._expand, items)))
            case ast.Prefix(_, operand):
                return node.replace(operand=self._expand(operand))
            case ast.Infix("is", left, _):
                return node.replace(left=self._expand(left))
            case ast.Infix(_, left, right):
                return node.replace(left=self._expand(left), right=self._expand(right))
        return node

    def names_in(self, node: Node) -> set[str]:
        """Return the lets a node depends on, directly or through others."""
        names: set[str] = set()
        todo = [node]
        while todo:
            item = todo.pop()
            if isinstance(item, ast.Ident) and item.id in self.values and item.id not in names:
                names.add(item.id)
                todo.append(self.values[item.id])
            todo += expandable(item)
        return names


def _levels(node: Node) -> int:
    """Return the levels of a tree, those of its chains included."""
    deepest, todo = 0, [(node, 1)]
    while todo:
        item, level = todo.pop()
        deepest = max(deepest, level)
        todo += [(child, level + 1) for child in ast.children(item)]
    return deepest


def expandable(node: Node) -> tuple[Node, ...]:
    """Return the children of a node that may contain names of lets."""
    if isinstance(node, ast.Apply) and node.function.id in ("type", "role"):
        return ()
    if isinstance(node, ast.Infix) and node.op == "is":
        return (node.left,)
    return ast.children(node)
