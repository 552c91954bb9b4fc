"""`trainc explain`: the page of a construct, a kind, a rule, or a word of the language."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from trainc.compiler.catalog import catalog
from trainc.dsl.printing.reference_pages import construct_page, rule_page
from trainc.dsl.reading.construct import KINDS
from trainc.dsl.reading.construct_rules import rules_of
from trainc.dsl.reading.fields import field_type
from trainc.dsl.text.language_topics import GROUPS, group_page, topic_page
from trainc.dsl.text.nearest import suggest
from trainc.dsl.text.rules import RULES

if TYPE_CHECKING:
    import typer


def explain_topic(words: Sequence[str]) -> str | None:
    """Return the pages of all that has a name, or without words a list of names; None for an unknown name."""
    if not words:
        return _contents()
    if len(words) == 1 and words[0] in RULES:
        return rule_page(words[0], RULES[words[0]])
    pages = [construct_page(catalog()[key]) for key in catalog() if tuple(words) in (key, key[1:])]
    if len(words) == 1:
        if words[0] in KINDS and (words[0], words[0]) not in catalog():
            pages.append(_kind(words[0]))
        pages += _of_language(words[0])
    if pages:
        return "\n".join(pages)
    if len(words) == 1 and words[0] in (rules := rules_of(catalog())):
        return rule_page(words[0], rules[words[0]])
    return None


def _of_language(word: str) -> list[str]:
    """Return the pages of a word of the language: a group of words, or a word in every group that has it."""
    if word in GROUPS:
        return [group_page(word)]
    plural = f"{word}s"
    pages = [topic_page(g, w) for g, words in GROUPS.items() for w in (word, plural) if w in words]
    pages += [
        f"`{word}` is a value of one field:\n\n{construct_page(construct)}"
        for construct in catalog().values()
        if any(
            word in own.functions
            for info in construct.model_fields.values()
            if (own := field_type(info)) is not None
        )
    ]
    return pages


def _kind(kind: str) -> str:
    rows = [f"{kind} {name}: {_summary(kind, name)}\n" for k, name in catalog() if k == kind]
    return "".join(rows) or f"`{kind}` has no constructs yet.\n"


def _summary(kind: str, name: str) -> str:
    return (catalog()[kind, name].__doc__ or "").strip().split("\n")[0]


def _contents() -> str:
    constructs = "".join(_kind(kind) for kind in KINDS if any(k == kind for k, _ in catalog()))
    rules = "".join(f"{rule}: {about.what}\n" for rule, about in rules_of(catalog()).items())
    words = "".join(f"{group}: {', '.join(GROUPS[group])}\n" for group in GROUPS)
    return f"Constructs\n\n{constructs}\nWords of the language\n\n{words}\nRules\n\n{rules}"


def _options() -> list[str]:
    names = [name for _, name in catalog()]
    language = [*GROUPS, *(word for words in GROUPS.values() for word in words)]
    both = [f"{kind} {name}" for kind, name in catalog()]
    return [*rules_of(catalog()), *names, *KINDS, *language, *both]


def register(app: "typer.Typer") -> None:
    """Add the command."""
    import typer

    @app.command("explain")
    def explain(
        topic: Annotated[
            list[str] | None,
            typer.Argument(metavar="[RULE | CONSTRUCT | WORD]", help="Default: list all of them."),
        ] = None,
    ) -> None:
        """Describe a construct, a diagnostic or a word of the language."""
        words = tuple(topic or ())
        text = explain_topic(words)
        if text is None:
            name = " ".join(words)
            help = suggest(name, _options()) or "`trainc explain` lists all names"
            print(f"no rule, kind, construct or word is called `{name}`: {help}", file=sys.stderr)
            raise typer.Exit(1)
        print(text, end="")
