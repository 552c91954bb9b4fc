"""Whatever the text, there is an answer within a second: a located error, never a traceback."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainc.compiler.catalog import catalog
from trainc.dsl.resolve.resolver import Checked, load_spec
from trainc.dsl.text.machine_formats import render_github, render_json, render_sarif
from trainc.dsl.text.render import render_text
from trainc.dsl.text.source import Source

DEEP = 100_000
HOSTILE = {
    "brackets": ("let a = " + "(" * DEEP, "too-deep"),
    "closed brackets": ("let a = " + "(" * DEEP + "1" + ")" * DEEP, "too-deep"),
    "lists": ("let a = " + "[" * DEEP, "too-deep"),
    "minus signs": ("let a = " + "-" * 15_000 + "1", "too-deep"),
    "not": ("when " + "not " * 15_000 + "loss > 1 { stop }", "too-deep"),
    "a long sum": ("let a = " + "1 + " * 8_000 + "1", "too-deep"),
    "one long line": ("optimizer adamw { lr = " + "1" * 10_000_000, "too-large"),
    "many words": ("a " * 120_000, "too-large"),
    "many statements": ("let a = b\n" * 4_500, None),
    "many broken statements": ("mask sift on {\n" * 4_500, None),
    "many strange characters": ("§" * 240_000, "syntax"),
    "many strange characters apart": ("§ " * 120_000, "syntax"),
    "many empty lines": ("\n \n" * 80_000 + "\\", "syntax"),
    "many single quotes": ("'" * 240_001, None),
    "many smart quotes": ("\u201c" * 240_001, None),
    "many dots": ("a" + "." * 240_000, None),
    "many colons": ("a:" * 20_000, None),
    "many digits and letters": ("1a" * 100_000, None),
    "many quotes": ('"' * 240_001, None),
    "NUL": ("let a = \0", "syntax"),
    "a huge exponent": ("optimizer adamw { lr = 1e999 }", "bad-value"),
    "a huge integer": ("run { length = 200 steps, seed = " + "9" * 10_000 + " }", "bad-value"),
    "a huge suffix": ("optimizer adamw { lr = " + "9" * 299 + "T }", "bad-value"),
    "a huge duration": ("run { length = 1e300 * 1e300 steps }", "bad-value"),
    "a division by zero": ("run { length = 1 steps / 0 }", "bad-value"),
    "a lone surrogate": ("let a = \ud800", "not-text"),
    "a string with a surrogate": ('model "\udc80" {}', "not-text"),
    "control characters": ("let a\x1b[31m = 3", "syntax"),
    "an unclosed string": ('model "' + "a" * 240_000, "syntax"),
    "many backslashes": ('model "' + "\\" * 240_000, "syntax"),
    "a number of underscores": ("let a = 1" + "_" * 240_000 + "x", "syntax"),
    "lets that double": (
        "".join(f"let a{n} = a{n + 1} + a{n + 1}\n" for n in range(60)) + "let a60 = 1\n"
        "optimizer adamw { lr = a0 }",
        "too-large",
    ),
    "lets in a chain": (
        "".join(f"let a{n} = -a{n + 1}\n" for n in range(3_000)) + "let a3000 = 1\n"
        "optimizer adamw { lr = a0 }",
        "too-large",
    ),
    "a file that is not there": ('use "no/such/file.train"', "use-not-found"),
    "a file name with NUL": ('use "a\\tb"', "use-not-found"),
    "a very long file name": ('use "' + "a" * 100_000 + '"', "use-not-found"),
    "a folder": ('use "."', "use-not-found"),
    "the root folder": ('use "/"', "use-outside"),
    "a file of the system": ('use "/etc/passwd"', "use-outside"),
}


def check(text: str) -> Checked:
    started = time.process_time()
    checked = load_spec(Source("hostile", text), catalog())
    # A second of the processor; what is quadratic in such texts takes minutes.
    assert time.process_time() - started < 20
    for render in (render_text, render_json, render_sarif, render_github):
        render(checked.diagnostics).encode()
    assert len(render_text(checked.diagnostics)) < 100_000
    return checked


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_answered(name: str) -> None:
    text, rule = HOSTILE[name]
    checked = check(text)
    assert checked.spec is None
    assert checked.errors[0].labels
    if rule:
        assert rule in {d.rule for d in checked.errors}


def test_what_is_just_not_too_deep_is_read() -> None:
    inner = "-" * 90 + "1"
    text = f"let a = {inner}\noptimizer adamw {{ lr = a, weight_decay = {inner} }}"
    assert check(text).spec
    names = " | ".join(f'"blocks.{n}.*"' for n in range(90))
    assert check(f"mask sift on {names} {{ density = 1% }}").spec


def test_a_file_that_is_not_utf8_is_located(tmp_path: Path) -> None:
    path = tmp_path / "spec.train"
    path.write_bytes(b"train 1\nlet a = \xff\n")
    (error,) = load_spec(path, catalog()).errors
    assert error.rule == "not-text"
    assert str(error.span).endswith("spec.train:2:9")


def test_a_file_with_a_byte_order_mark_and_crlf_is_read(tmp_path: Path) -> None:
    path = tmp_path / "spec.train"
    path.write_bytes(b"\xef\xbb\xbftrain 1\r\noptimizer adamw { lr = 3e-4 }\r\n")
    assert load_spec(path, catalog()).unwrap().version == 1


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "train 1"])
def test_an_empty_text_is_an_empty_spec(text: str) -> None:
    assert load_spec(text, catalog()).unwrap().clauses == ()


@settings(max_examples=200)
@given(st.text(max_size=80))
def test_any_text_is_answered(text: str) -> None:
    load_spec(Source("random", text), catalog())


WORDS = st.sampled_from(
    ["train", "let", "use", "when", "for", "on", "as", "from", "until", "every", "optional",
     "where", "expect", "is", "nan", "or", "and", "not", "then", "model", "data", "loss", "run",
     "optimizer", "adamw", "lr", "mask", "sift", "gns", "{", "}", "(", ")", "[", "]", ",", "=",
     "==", "<", "+", "-", "*", "/", "|", "&", "..", "%", '"a:b"', '"x"', "3e-4", "1", "200",
     "steps", "5k", "tokens", "depth", "warmup", "cosine", "type", "ndim", "all", "stop", "batch"]
)  # fmt: skip


@settings(max_examples=400)
@given(st.lists(WORDS, max_size=25).map(" ".join))
def test_any_words_are_answered(text: str) -> None:
    checked = load_spec(Source("random", text), catalog())
    assert checked.spec is not None or checked.errors
    render_text(checked.diagnostics)
