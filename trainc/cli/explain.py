"""`trainc explain`: the page of a construct, a kind or a rule."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from trainc.compiler.catalog import catalog
from trainc.dsl.printing.reference_pages import construct_page, rule_page
from trainc.dsl.reading.construct import KINDS
from trainc.dsl.reading.construct_rules import rules_of
from trainc.dsl.text.nearest import suggest
from trainc.dsl.text.rules import RULES

if TYPE_CHECKING:
    import typer


def explain_topic(words: Sequence[str]) -> str | None:
    """Return the page of a rule, a construct or a kind, or without words a list of all; None for an unknown name."""
    if not words:
        return _contents()
    if len(words) == 1 and words[0] in RULES:
        return rule_page(words[0], RULES[words[0]])
    pages = [construct_page(catalog()[key]) for key in catalog() if tuple(words) in (key, key[1:])]
    if pages:
        return "\n".join(pages)
    if len(words) == 1 and words[0] in KINDS:
        return _kind(words[0])
    if len(words) == 1 and words[0] in (rules := rules_of(catalog())):
        return rule_page(words[0], rules[words[0]])
    return None


def _kind(kind: str) -> str:
    rows = [f"{kind} {name}: {_summary(kind, name)}\n" for k, name in catalog() if k == kind]
    return "".join(rows) or f"`{kind}` has no constructs yet.\n"


def _summary(kind: str, name: str) -> str:
    return (catalog()[kind, name].__doc__ or "").strip().split("\n")[0]


def _contents() -> str:
    constructs = "".join(_kind(kind) for kind in KINDS if any(k == kind for k, _ in catalog()))
    rules = "".join(f"{rule}: {about.what}\n" for rule, about in rules_of(catalog()).items())
    return f"Constructs\n\n{constructs}\nRules\n\n{rules}"


def _options() -> list[str]:
    names = [name for _, name in catalog()]
    return [*rules_of(catalog()), *names, *KINDS, *(f"{kind} {name}" for kind, name in catalog())]


def register(app: "typer.Typer") -> None:
    """Add the command."""
    import typer

    @app.command("explain")
    def explain(
        topic: Annotated[
            list[str] | None,
            typer.Argument(metavar="[RULE | CONSTRUCT]", help="Default: list all of them."),
        ] = None,
    ) -> None:
        """Describe a construct or a diagnostic."""
        words = tuple(topic or ())
        text = explain_topic(words)
        if text is None:
            name = " ".join(words)
            help = suggest(name, _options()) or "`trainc explain` lists all names"
            print(f"no rule, kind or construct is called `{name}`: {help}", file=sys.stderr)
            raise typer.Exit(1)
        print(text, end="")
