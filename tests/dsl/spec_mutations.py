"""Texts that are nearly a spec: the examples, with characters or words put in, left out, changed or swapped."""

import re
from pathlib import Path

from hypothesis import strategies as st

EXAMPLES = {
    path.name: path.read_text()
    for path in sorted((Path(__file__).parents[2] / "examples").glob("*.train"))
}
WORD = re.compile(r'"[^"\n]*"|\w+|[^\w\s]+|\s+')
WORDS = sorted({word for text in EXAMPLES.values() for word in WORD.findall(text)})
CHARACTERS = st.sampled_from(
    "{}()[]|&=,.:;%#\"'`*+-/<>!?\\\n\t 0123eEkx_£\u201c\u2019\u00a0\u2028\u00e9"
)


@st.composite
def mutations(draw: st.DrawFn, most: int = 3) -> str:
    """Draw the text of an example with one to `most` mutations."""
    text = EXAMPLES[draw(st.sampled_from(sorted(EXAMPLES)))]
    for _ in range(draw(st.integers(1, most))):
        text = draw(st.sampled_from([_words, _characters, _cut]))(draw, text)
    return text


def _words(draw: st.DrawFn, text: str) -> str:
    """Leave out, double, replace or swap whole words."""
    words = WORD.findall(text)
    if not words:
        return text
    at, other = (draw(st.integers(0, len(words) - 1)) for _ in range(2))
    change = draw(st.sampled_from(["out", "in", "other", "swap", "double"]))
    if change == "out":
        del words[at : at + draw(st.integers(1, 3))]
    elif change == "in":
        words.insert(at, draw(st.sampled_from(WORDS)))
    elif change == "other":
        words[at] = draw(st.sampled_from(WORDS))
    elif change == "swap":
        words[at], words[other] = words[other], words[at]
    else:
        low, high = sorted((at, other))
        words[high:high] = words[low : min(high, low + 20)]
    return "".join(words)


def _characters(draw: st.DrawFn, text: str) -> str:
    """Leave out, put in or replace single characters."""
    at = draw(st.integers(0, len(text)))
    out, new = draw(st.integers(0, 2)), draw(st.text(CHARACTERS, max_size=2))
    return text[:at] + new + text[at + out :]


def _cut(draw: st.DrawFn, text: str) -> str:
    """Leave only the beginning or the end."""
    at = draw(st.integers(0, len(text)))
    return text[:at] if draw(st.booleans()) else text[at:]
