"""Docstrings of three styles, and those that are none of them."""

from __future__ import annotations

import pytest

from loopmux.docstrings import Docstring, parse

GOOGLE = """Book a table.

    Calls the restaurant.

    Args:
        people (int): how many
            come
        *extras: wishes
        when: the hour: 18 to 22

    Returns:
        table: its number

    Raises:
        ValueError: closed
    """
NUMPY = """Book a table.

    Calls the restaurant.

    Parameters
    ----------
    people : int
        how many
        come
    extras, more
        wishes
    when
        the hour: 18 to 22

    Returns
    -------
    table : int
        its number
    """
REST = """Book a table.

    Calls the restaurant.

    :param int people: how many
        come
    :param extras: wishes
    :type extras: list
    :parameter when: the hour: 18 to 22
    :returns: its number
    :raises ValueError: closed
    """
PARAMETERS = {"people": "how many come", "extras": "wishes", "when": "the hour: 18 to 22"}


@pytest.mark.parametrize(
    ("text", "parameters"), [(GOOGLE, PARAMETERS), (NUMPY, PARAMETERS | {"more": "wishes"}), (REST, PARAMETERS)]
)
def test_a_style(text: str, parameters: dict[str, str]):
    assert parse(text) == Docstring("Book a table.\n\nCalls the restaurant.", parameters)


@pytest.mark.parametrize("text", [None, "", "   \n  "])
def test_nothing_to_say(text: str | None):
    assert parse(text) == Docstring()


@pytest.mark.parametrize(
    "text",
    [
        "One line.",
        "Colons: everywhere, note: this.",
        "Args: are not a section on a line with text.",
        "A list:\n\n- a: b\n- c: d",
        "A rule\n---- not\nunderlined",
        "Ends with args:",
    ],
)
def test_text_that_only_looks_like_a_section_stays_text(text: str):
    assert parse(text) == Docstring(text)


def test_text_after_the_sections_is_kept():
    assert parse("Go.\n\nArgs:\n    a: b\n\nMore.") == Docstring("Go.\n\nMore.", {"a": "b"})
