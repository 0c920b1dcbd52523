from __future__ import annotations

from pathlib import Path

import pytest

from loopmux_launcher import pipsettings


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "pip.conf").write_text(
        "[global]\nindex-url = https://own/simple\nfind-links =\n    /a\n    /b\n[install]\nno_index = no\n"
    )
    return {"HOME": str(tmp_path / "none"), "XDG_CONFIG_HOME": str(tmp_path), "XDG_CONFIG_DIRS": str(tmp_path / "no")}


def test_pips_files_and_variables_become_uvs(variables: dict[str, str]) -> None:
    variables |= {"PIP_EXTRA_INDEX_URL": "https://b/simple https://c/simple", "PIP_CERT": "/c.pem"}
    found = pipsettings.for_uv(variables)
    assert (
        found
        | {
            "UV_DEFAULT_INDEX": "https://own/simple",
            "UV_INDEX": "https://b/simple https://c/simple",
            "UV_FIND_LINKS": "/a,/b",
            "SSL_CERT_FILE": "/c.pem",
            "UV_INDEX_STRATEGY": "unsafe-best-match",
        }
        == found
    )
    assert "UV_NO_INDEX" not in found


def test_what_uv_was_told_itself_stands(variables: dict[str, str]) -> None:
    assert "UV_DEFAULT_INDEX" not in pipsettings.for_uv({**variables, "UV_INDEX_URL": "https://mine"})


def test_a_variable_goes_over_a_file_and_a_named_file_over_both_others(
    variables: dict[str, str], tmp_path: Path
) -> None:
    named = tmp_path / "named.conf"
    named.write_text("[install]\nindex-url = https://named\nno-index = true\n")
    assert pipsettings.settings({**variables, "PIP_CONFIG_FILE": str(named)})["index-url"] == "https://named"
    assert pipsettings.settings({**variables, "PIP_INDEX_URL": "https://v"})["index-url"] == "https://v"
    assert pipsettings.for_uv({**variables, "PIP_CONFIG_FILE": str(named)})["UV_NO_INDEX"] == "true"
    assert pipsettings.settings({**variables, "PIP_CONFIG_FILE": "/dev/null"}) == {"config-file": "/dev/null"}


def test_a_file_that_pip_would_refuse_is_passed_over(variables: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "pip" / "pip.conf").write_text("index-url = x\n")
    assert "UV_DEFAULT_INDEX" not in pipsettings.for_uv(variables)
