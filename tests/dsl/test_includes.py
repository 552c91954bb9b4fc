"""Files that use each other."""

import os
from pathlib import Path

import pytest

from trainc.compiler.catalog import check
from trainc.dsl.text.render import render_text


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / f"{name}.train"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder / "main.train"


def test_lets_and_clauses_come_along(tmp_path: Path) -> None:
    main = write(
        tmp_path,
        main='use "parts/lets.train"\noptimizer adamw { lr = peak }\n',
        **{
            "parts/lets": 'use "more.train"\nlet peak = base * 3\n',
            "parts/more": "let base = 1e-4\nloss mse\n",
        },
    )
    spec = check(main).unwrap()
    assert [clause.title for clause in spec.clauses] == ["loss mse", "optimizer adamw"]


def test_a_file_used_twice_comes_once(tmp_path: Path) -> None:
    main = write(
        tmp_path,
        main='use "a.train"\nuse "b.train"\n',
        a='use "c.train"\n',
        b='use "c.train"\n',
        c="loss mse\n",
    )
    assert len(check(main).unwrap().clauses) == 1


def test_a_circle_shows_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, main='use "a.train"\n', a='use "main.train"\n')
    (d,) = check(Path("main.train")).errors
    assert d.rule == "include-cycle"
    assert [str(label.span) for label in d.labels] == ["a.train:1:1", "main.train:1:1"]


def test_a_missing_file_does_not_make_its_names_unknown(tmp_path: Path) -> None:
    main = write(tmp_path, main='use "lets.train"\noptimizer adamw { lr = peak * 2 }\n')
    assert [d.rule for d in check(main).errors] == ["use-not-found"]


def test_mistakes_name_the_file_they_are_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path,
        main='use "a.train"\nloss cross_entropi\n',
        a="loss\nmse\nrun { lenght = 200 steps }\n",
    )
    text = render_text(check(Path("main.train")).errors)
    assert "--> a.train:3:7" in text
    assert "--> main.train:2:6" in text


def test_two_files_may_not_define_one_name(tmp_path: Path) -> None:
    main = write(tmp_path, main='use "a.train"\nlet x = 1\n', a="let x = 2\n")
    (d,) = check(main).errors
    assert d.rule == "duplicate-let"
    assert len({label.span.source.name for label in d.labels}) == 2


def test_the_version_comes_first_in_each_file(tmp_path: Path) -> None:
    main = write(tmp_path, main='train 1\nuse "a.train"\n', a="train 1\nloss mse\n")
    assert check(main).unwrap()


def test_use_stays_below_the_folder_of_the_spec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, folder = tmp_path / "shared", tmp_path / "spec"
    write(shared, lets="let secret = 3\n")
    (folder / "parts").mkdir(parents=True)
    (folder / "link").symlink_to(shared)
    for where in ("../shared/lets.train", str(shared / "lets.train"), "link/lets.train"):
        main = write(folder, main=f'use "{where}"\nloss mse\n')
        (found,) = check(main).diagnostics
        assert found.rule == "use-outside"
        assert "TRAINC_USE_PATH" in (found.help or "")
        assert "secret" not in render_text([found])
    write(folder, main='use "parts/inner.train"\nloss mse\n')
    (folder / "parts/inner.train").write_text('use "../more.train"\n')
    (folder / "more.train").write_text("optimizer sgd { lr = 1 }\n")
    assert check(main).spec is not None
    write(folder, main=f'use "{shared}/lets.train"\noptimizer sgd {{ lr = secret }}\n')
    monkeypatch.setenv("TRAINC_USE_PATH", f"/nowhere:{shared}")
    assert check(main).spec is not None
    monkeypatch.setenv("TRAINC_USE_PATH", "")
    assert check(main).spec is None


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_not_a_plain_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    odd = tmp_path / "odd.train"
    if kind == "pipe":
        os.mkfifo(odd)
    elif kind == "device":
        odd = Path("/dev/zero")
    else:
        odd.mkdir()
    with pytest.raises(OSError, match="Is a directory" if kind == "folder" else "Not a plain file"):
        check(odd)
    if kind != "device":
        (found,) = check(write(tmp_path, main='use "odd.train"\n')).diagnostics
        assert found.rule == "use-not-found"


def test_a_huge_file_is_refused_without_being_read(tmp_path: Path) -> None:
    main = write(tmp_path, main='use "huge.train"\nloss mse\n')
    with (tmp_path / "huge.train").open("wb") as file:
        file.truncate(1 << 40)
    for spec in (main, tmp_path / "huge.train"):
        assert [d.rule for d in check(spec).diagnostics] == ["too-large"]
