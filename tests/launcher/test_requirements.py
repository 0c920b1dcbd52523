from __future__ import annotations

from pathlib import Path

import pytest

from loopmux_launcher import requirements, workercode
from loopmux_launcher.config import Environment
from loopmux_launcher.interpreters import EnvironmentUnusable

WORKERS = workercode.REQUIREMENTS


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / "needs").mkdir(exist_ok=True)
        (folder / "needs" / f"{name}.txt").write_text(text)


def test_a_file_is_read_with_those_that_it_names_relative_to_itself(tmp_path: Path) -> None:
    top = "a==1  # why\n# no more\n\n--pre\nb; python_version \\\n> '3'\n-r more.txt\n--constraint=limits.txt\n"
    write(tmp_path, top=top, more="c\n-r https://x.invalid/needs.txt\n", limits="d<2\n-r more.txt\n")
    environment = Environment("e", tmp_path, requirements_file=tmp_path / "needs" / "top.txt")
    remote = "-r https://x.invalid/needs.txt"
    b = "b; python_version  > '3'"
    limits = ("constraint: d<2", "constraint: c", f"constraint: {remote}")
    assert requirements.declared(environment) == ("a==1", "--pre", b, "c", remote, *limits, *WORKERS)
    assert requirements.packages(environment) == ("a==1", b, "c", *limits, *WORKERS)  # options may hold passwords
    assert requirements.generated(environment).splitlines() == [f"-r {environment.requirements_file}", *WORKERS]


def test_lines_may_name_files_relative_to_the_configuration(tmp_path: Path) -> None:
    write(tmp_path, more="c\n")
    environment = Environment("e", tmp_path, requirements=("a", "-r needs/more.txt"))
    assert requirements.declared(environment) == ("a", "c", *WORKERS)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            {"top": "-r more.txt\n", "more": "a\n-c top.txt\n"},
            "/needs/top.txt names itself, by way of .*/needs/more.txt",
        ),
        ({"top": "-r gone.txt\n"}, "/needs/gone.txt cannot be read: .*No such file"),
    ],
)
def test_files_that_lead_nowhere_are_named(tmp_path: Path, files: dict[str, str], says: str) -> None:
    write(tmp_path, **files)
    with pytest.raises(EnvironmentUnusable, match=says):
        requirements.declared(Environment("e", tmp_path, requirements_file=tmp_path / "needs" / "top.txt"))


def test_the_installer_gets_where_packages_come_from_and_every_path_absolute(tmp_path: Path) -> None:
    options = ("--no-index", "--find-links wheels", "--find-links=/w", "--find-links https://x.invalid/w")
    lines = (
        "torch==2",
        "./w/a.whl",
        "../b",
        "-e ./c",
        "d @ file:///d.whl",
        "-r needs/more.txt",
        "-c https://x.invalid/c",
    )
    made = requirements.generated(Environment("e", tmp_path, requirements=lines, index_options=options)).splitlines()
    index = ["--no-index", f"--find-links {tmp_path}/wheels", "--find-links /w", options[3]]
    ours = [f"{tmp_path}/w/a.whl", f"{tmp_path}/../b", f"-e {tmp_path}/c", lines[4], f"-r {tmp_path}/needs/more.txt"]
    assert made == [*index, "torch==2", *ours, lines[6], *WORKERS]
