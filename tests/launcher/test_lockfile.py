from __future__ import annotations

import pytest

from loopmux_launcher import lockfile
from loopmux_launcher.lockfile import Lock, Pin, Unlockable

ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64
LOCK = Lock(
    "cpython 3.11 on linux-x86_64",
    ("torch>=2", "b; python_version < '4'"),
    (Pin("b @ file:///w/b-1-py3-none-any.whl", (TWO,)), Pin("torch==2.13.0+cpu", (ONE, TWO))),
)


def test_what_is_written_is_read_again() -> None:
    text = lockfile.render(LOCK)
    assert lockfile.parse(text) == LOCK
    assert f"torch==2.13.0+cpu \\\n    --hash={ONE} \\\n    --hash={TWO}\n" in text


def test_uvs_output_is_read() -> None:
    first, second = "cc @ file:///w/cc-1.0-py3-none-any.whl", "B==1.0 ; sys_platform == 'linux'"
    text = f"{first} \\\n    --hash={ONE}\n{second} \\\n    --hash={TWO}\n"
    assert lockfile.pins(text) == (Pin(second, (TWO,)), Pin(first, (ONE,)))


def test_pips_report_is_read() -> None:
    def item(name: str, url: str, *, direct: bool, **source: object) -> dict[str, object]:
        return {
            "metadata": {"name": name, "version": "1"}, "is_direct": direct, "download_info": {"url": url, **source}
        }  # fmt: skip

    hashed = {"archive_info": {"hashes": {"sha256": "1" * 64}}}
    report = {"version": "1", "install": [item("b", "file:///b.whl", direct=True, **hashed),
                                          item("a", "https://x/a.whl", direct=False, **hashed)]}  # fmt: skip
    assert lockfile.from_report(report) == (Pin("a==1", (ONE,)), Pin("b @ file:///b.whl", (ONE,)))
    with pytest.raises(Unlockable, match="installation report"):
        lockfile.from_report({"version": "2", "install": []})
    folder = item("c", "file:///c", direct=True, dir_info={})
    with pytest.raises(Unlockable, match="c @ file:///c has no hash: folders and repositories cannot be locked"):
        lockfile.from_report({"version": "1", "install": [folder]})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected a lock file"),
        ("torch==2\n", "expected a lock file"),
        (lockfile.render(LOCK).replace("==2.13.0+cpu", ">=2"), "found 'torch>=2', expected a package with its exact"),
        (lockfile.render(LOCK).replace(f" \\\n    --hash={TWO}", ""), "has no hash"),
        (lockfile.render(Lock("x", ("a",), ())), "found no package"),
    ],
)
def test_what_is_no_lock_file_is_refused(text: str, says: str) -> None:
    with pytest.raises(Unlockable, match=says.replace("+", r"\+")):
        lockfile.parse(text)


def test_a_disagreement_names_what_differs() -> None:
    assert lockfile.disagreement(LOCK, LOCK.inputs[::-1], LOCK.made_for) == ""
    assert lockfile.disagreement(LOCK, LOCK.inputs, "cpython 3.12 on linux-x86_64") == (
        "it was made for cpython 3.11 on linux-x86_64, and this is cpython 3.12 on linux-x86_64"
    )
    assert lockfile.disagreement(LOCK, ("torch>=3", LOCK.inputs[1]), LOCK.made_for) == (
        "torch>=3 is not in it; it was made for torch>=2"
    )


def test_changes_are_told_by_package_however_it_is_spelt() -> None:
    old = Lock(LOCK.made_for, LOCK.inputs, (*LOCK.pins, Pin("Typing_Extensions==4.1", (ONE,))))
    pins = tuple(Pin(line, (ONE,)) for line in ("torch==2.14.0", "c==1", "typing-extensions==4.1"))
    new = Lock(LOCK.made_for, LOCK.inputs, pins)
    assert lockfile.changes(old, new) == ["b removed", "c 1", "torch 2.13.0+cpu → 2.14.0"]
    assert lockfile.changes(old, old) == []
