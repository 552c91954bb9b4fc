"""Every rule that a diagnostic can name; a name describes the mistake, not the cure."""

from __future__ import annotations

from trainc.dsl.text.language_rules import LANGUAGE_RULES
from trainc.dsl.text.model_rules import MODEL_RULES

RULES = {**LANGUAGE_RULES, **MODEL_RULES}
