"""The command's exit codes, and what it prints when something is wrong."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import typer

from trainc.cli.app import SUMMARIES, main
from trainc.dsl.text.errors import SpecError

Verb = Callable[[Callable[[str], None]], int]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Verb:
    """Return a function that runs `trainc check spec.train` with another body."""

    def run(body: Callable[[str], None]) -> int:
        verb = ModuleType("trainc.cli.check")
        verb.register = lambda scope: scope.command("check")(body)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "trainc.cli.check", verb)
        return command(monkeypatch, "check", "spec.train")

    return run


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["trainc", *arguments])
    with pytest.raises(SystemExit) as done:
        main()
    assert isinstance(done.value.code, int)
    return done.value.code


def test_a_verb_gets_its_arguments(check: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    def body(spec: str) -> None:
        print(spec)

    assert check(body) == 0
    assert capsys.readouterr().out == "spec.train\n"


def test_a_verb_chooses_its_exit_code(check: Verb) -> None:
    def body(spec: str) -> None:
        raise typer.Exit(1)

    assert check(body) == 1


def test_a_mistake_in_the_spec_is_printed_without_a_traceback(
    check: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    def body(spec: str) -> None:
        raise SpecError([])

    assert check(body) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_missing_file_is_named(check: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(in_trainc("FileNotFoundError(2, 'No such file or directory', spec)")) == 1
    assert capsys.readouterr().err == "trainc: spec.train: No such file or directory\n"


def test_checking_a_missing_file_names_it_without_the_framework() -> None:
    code = "import sys; from trainc.cli.entry import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "check", "none.train"], text=True, capture_output=True
    )
    assert done.returncode == 1
    assert done.stderr == "trainc: none.train: No such file or directory\n"


def test_an_interrupt_is_said_in_the_exit_code(check: Verb) -> None:
    def body(spec: str) -> None:
        raise KeyboardInterrupt

    assert check(body) == 130


def in_trainc(raises: str) -> Callable[[str], None]:
    """Return the body of a verb as trainc's own code has it."""
    scope: dict[str, Callable[[str], None]] = {}
    file = Path(main.__code__.co_filename).with_name("made_up.py")
    exec(compile(f"def body(spec: str) -> None:\n    raise {raises}", str(file), "exec"), scope)
    return scope["body"]


@pytest.mark.parametrize("name", ["KeyError", "AssertionError", "ZeroDivisionError"])
def test_a_mistake_of_ours_keeps_its_traceback(check: Verb, name: str) -> None:
    with pytest.raises(Exception, match="ours") as caught:
        check(in_trainc(f"{name}('ours')"))
    assert caught.type.__name__ == name


@pytest.mark.parametrize("name", ["ValueError", "RuntimeError", "TypeError"])
def test_what_we_say_is_wrong_is_one_line(
    check: Verb, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert check(in_trainc(f"{name}('write this instead')")) == 1
    assert capsys.readouterr().err == "trainc: write this instead\n"


def test_the_user_may_ask_for_every_traceback(check: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINC_TRACEBACK", "1")
    with pytest.raises(ValueError, match="write this"):
        check(in_trainc("ValueError('write this')"))


def test_only_the_users_own_code_shows_its_traceback(
    check: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    def model(width: int) -> float:
        return 1 / width

    def body(spec: str) -> None:
        try:
            model(0)
        except ZeroDivisionError as error:
            raise SpecError([]) from error

    assert check(body) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):")
    assert "in body" in said
    assert "ZeroDivisionError: division by zero" in said
    assert "trainc/cli" not in said


def test_nobody_reads_the_output(check: Verb) -> None:
    command = f"{sys.executable} -P -m trainc explain | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode in (0, 141)


def test_an_unknown_verb_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "chekc") == 2
    assert "Did you mean 'check'?" in capsys.readouterr().err


def test_the_version_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("trainc 0.")


def test_help_says_what_each_verb_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    for verb, summary in SUMMARIES.items():
        assert any(line.split() == [verb, *summary.split()] for line in shown.splitlines()), verb


def test_every_verb_on_disk_is_dispatched() -> None:
    folder = Path(__file__).parents[2] / "trainc/cli"
    on_disk = {
        path.stem.replace("_", "-")
        for path in folder.glob("*.py")
        if "def register(" in path.read_text()
    }
    assert on_disk == set(SUMMARIES)


def test_help_lists_the_verbs_without_importing_any() -> None:
    program = (
        "import sys; from trainc.cli.app import app; app(['--help'], standalone_mode=False);"
        "print(sorted(m for m in sys.modules if m.startswith('trainc.cli.')))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True
    )
    *help_text, modules = done.stdout.splitlines()
    assert modules == "['trainc.cli.app', 'trainc.cli.failures']"
    assert any(line.split()[:1] == ["check"] for line in help_text)
