"""Every rule of the language and the compiler that a diagnostic can name; constructs may bring their own.

A name describes the mistake, not the cure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from trainc.dsl.text.language_rules import LANGUAGE_RULES
from trainc.dsl.text.model_rules import MODEL_RULES

RULES = {**LANGUAGE_RULES, **MODEL_RULES}


def check_names(owner: str, names: Iterable[str]) -> None:
    """Raise ValueError for a rule of a construct that has no name of its own, in words joined by hyphens."""
    for name in names:
        if not re.fullmatch(r"[a-z]+(-[a-z]+)*", name):
            raise ValueError(
                f"`rules` of `{owner}` has `{name}`: write words in small letters, joined by hyphens, such as"
                " `norm-mixes-examples`"
            )
        if name in RULES:
            raise ValueError(
                f"`rules` of `{owner}` has `{name}`, which is a rule of the language: use it without declaring it, or"
                " choose another name"
            )
