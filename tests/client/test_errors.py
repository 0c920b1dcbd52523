from __future__ import annotations

import difflib
import re
from typing import Any

import pytest

from loopmux import errors
from loopmux.errors import BY_CODE, LoopmuxError, from_code, unknown_model

BUILT_INS = {
    "BadRequestError": ValueError,
    "ModelNotFoundError": LookupError,
    "AdapterNotFoundError": LookupError,
    "DeadlineExceededError": TimeoutError,
    "AuthError": PermissionError,
    "ConnectionLostError": ConnectionError,
}


def drawn_tree() -> dict[str, tuple[str, str]]:
    """Class to (parent, code), as the module's docstring draws it."""
    found, path = {}, ["LoopmuxError"]
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ([│ ]*)[├└]── (\w+) .*?(\w+)$", line)
        if match:
            depth = len(match[1]) // 4 + 1
            path[depth:] = [match[2]]
            found[match[2]] = (path[depth - 1], match[3])
    return found


def test_the_drawn_tree_is_the_real_one() -> None:
    real = {c.__name__: (c.__bases__[0].__name__, c.code) for c in BY_CODE.values() if c is not LoopmuxError}
    assert drawn_tree() == real


@pytest.mark.parametrize("code", BY_CODE)
def test_every_class_is_made_from_its_code(code: str) -> None:
    error = from_code(
        code,
        "what happened",
        request_id="ab",
        model="m",
        worker="w",
        retryable=True,
        partial_text="so far",
        retry_after=2.0,
    )
    assert type(error) is BY_CODE[code]
    assert error.code == code
    assert str(error) == error.message == "what happened"
    details = (error.request_id, error.model, error.worker, error.retryable, error.partial_text, error.retry_after)
    assert details == ("ab", "m", "w", True, "so far", 2.0)


def test_codes_are_unique() -> None:
    def family(root: type[LoopmuxError]) -> list[type[LoopmuxError]]:
        return [root, *(c for sub in root.__subclasses__() for c in family(sub))]

    codes = [c.code for c in family(LoopmuxError) if c.__module__ == "loopmux.errors"]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize(("name", "built_in"), BUILT_INS.items())
def test_errors_that_mean_a_built_in_one_are_one(name: str, built_in: type[Exception]) -> None:
    assert issubclass(getattr(errors, name), built_in)


def test_a_code_of_a_newer_peer_is_still_an_error_of_ours() -> None:
    assert type(from_code("tea_break", "later")) is LoopmuxError


def test_retryable_has_a_default_per_class() -> None:
    retryable = {cls.__name__ for cls in BY_CODE.values() if cls("x").retryable}
    assert retryable == {"OverloadedError", "WorkerLostError", "ConnectionLostError"}


def test_of_thousands_of_models_few_are_compared_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    near = difflib.get_close_matches

    def note(name: str, names: list[str], **options: Any) -> list[str]:
        compared.extend(names)
        return near(name, names, **options)

    monkeypatch.setattr(difflib, "get_close_matches", note)
    error = unknown_model("mistrall", ["mistral", *(f"m{n}" for n in range(2_000))])
    assert error.message.endswith(" and 1951 more; did you mean 'mistral'?")
    assert len(error.message) < 1_000
    assert len(compared) <= 64
