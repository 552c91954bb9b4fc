"""`trainc check`, `fmt` and `explain`."""

import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trainc.cli.app import app
from trainc.cli.check import check_quickly, check_specs
from trainc.cli.fmt import format_files

RIGHT = "optimizer adamw { lr = 3e-4 }\n"
WRONG = "optimizer adamw { lr = 3e-4, epss = 3 }\nloss mze\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "right.train").write_text(RIGHT)
    (tmp_path / "wrong.train").write_text(WRONG)
    return tmp_path


@pytest.mark.usefixtures("folder")
class TestCheck:
    def test_a_right_spec_is_counted(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert check_specs(["right.train"]) == 0
        assert capsys.readouterr().out == "right.train: 1 clause, 0 rules\n"

    def test_a_wrong_spec_has_all_its_errors(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert check_specs(["wrong.train"]) == 1
        out = capsys.readouterr().out
        assert "error[unknown-field]" in out
        assert "error[unknown-construct]" in out
        assert out.endswith("2 errors\n")

    def test_json_has_places_and_edits(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert check_specs(["wrong.train"], form="json") == 1
        first, second = json.loads(capsys.readouterr().out)
        assert (first["labels"][0]["line"], first["labels"][0]["column"]) == (1, 30)
        assert first["edit"]["text"] == "eps"
        assert second["rule"] == "unknown-construct"

    def test_sarif_names_its_rules(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert check_specs(["right.train", "wrong.train"], form="sarif") == 1
        (run,) = json.loads(capsys.readouterr().out)["runs"]
        rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
        assert [r["ruleId"] for r in run["results"]] == ["unknown-field", "unknown-construct"]
        assert all(rules[r["ruleIndex"]] == r["ruleId"] for r in run["results"])

    def test_github_gets_one_line_each(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert check_specs(["wrong.train"], form="github") == 1
        first, second = capsys.readouterr().out.splitlines()
        assert first.startswith("::error title=unknown-field,file=wrong.train,line=1,col=30,")
        assert "did you mean" in second

    def test_standard_input_is_a_file_too(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO(WRONG))
        assert check_specs(["-"]) == 1
        assert "--> <stdin>:1:30" in capsys.readouterr().out

    def test_file_names_alone_need_no_command_line_parser(self) -> None:
        assert check_quickly(["right.train"]) == 0
        assert check_quickly(["right.train", "wrong.train"]) == 1
        assert check_quickly([]) is None

    @pytest.mark.parametrize(
        "odd",
        [["--help"], ["--format"], ["--format", "xml"], ["--set"], ["--set="], ["--", "x"], ["-q"]],
        ids=" ".join,
    )
    def test_other_arguments_are_left_to_the_framework(self, odd: list[str]) -> None:
        assert check_quickly(["right.train", *odd]) is None

    @pytest.mark.parametrize(
        "arguments",
        [
            ["right.train"],
            ["wrong.train", "right.train"],
            ["right.train", "--format", "json"],
            ["--format=github", "wrong.train"],
            ["--format", "json", "wrong.train", "--format", "sarif"],
            ["let.train", "--set", "peak=1e-3"],
            ["--set=peak=x", "let.train", "--set", "peek = 1"],
        ],
        ids=" ".join,
    )
    def test_both_readers_of_the_command_line_do_the_same(
        self, arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("let.train").write_text("let peak = 3e-4\noptimizer adamw { lr = peak }\n")
        result = CliRunner().invoke(app, ["check", *arguments])
        assert check_quickly(arguments) == result.exit_code
        assert capsys.readouterr().out == result.output

    def test_settings_reach_the_lets(self) -> None:
        Path("let.train").write_text("let peak = 3e-4\noptimizer adamw { lr = peak }\n")
        runner = CliRunner()
        assert runner.invoke(app, ["check", "let.train", "--set", "peak=1e-3"]).exit_code == 0
        result = runner.invoke(app, ["check", "let.train", "--set", "peek=1e-3"])
        assert result.exit_code == 1
        assert "did you mean `peak`?" in result.output


class TestFmt:
    def test_files_and_folders_are_rewritten(self, folder: Path) -> None:
        (folder / "messy.train").write_text("loss   mse   # c\n\n\n\noptimizer adamw {lr=1}")
        assert format_files(["."], check=True) == 1
        assert format_files(["."]) == 0
        assert (
            folder / "messy.train"
        ).read_text() == "loss mse  # c\n\noptimizer adamw { lr = 1 }\n"
        assert format_files(["."], check=True) == 0

    def test_diff_writes_nothing(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (folder / "messy.train").write_text("loss   mse")
        assert format_files(["messy.train"], diff=True) == 1
        assert "+loss mse" in capsys.readouterr().out
        assert (folder / "messy.train").read_text() == "loss   mse"

    def test_what_does_not_parse_is_left_alone(self, folder: Path) -> None:
        (folder / "broken.train").write_text("loss mse {")
        assert format_files(["broken.train"]) == 1
        assert (folder / "broken.train").read_text() == "loss mse {"

    def test_standard_input_goes_to_standard_output(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("loss   mse"))
        assert format_files(["-"]) == 0
        assert capsys.readouterr().out == "loss mse\n"

    def test_line_ends_are_made_equal(self, folder: Path) -> None:
        (folder / "dos.train").write_bytes(b"loss mse\r\n")
        assert format_files(["dos.train"]) == 0
        assert (folder / "dos.train").read_bytes() == b"loss mse\n"


class TestExplain:
    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["pace"], "# regularize pace"),
            (["regularize", "pace"], "# regularize pace"),
            (["unknown-field"], "# unknown-field"),
            (["optimizer"], "optimizer adamw:"),
            ([], "Rules"),
        ],
    )
    def test_topics(self, words: list[str], expected: str) -> None:
        result = CliRunner().invoke(app, ["explain", *words])
        assert result.exit_code == 0
        assert expected in result.output

    def test_an_unknown_topic_is_suggested(self) -> None:
        result = CliRunner().invoke(app, ["explain", "pase"])
        assert result.exit_code == 1
        assert "did you mean `pace`?" in result.output
