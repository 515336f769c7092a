"""Names and numbers for terminals and pages: width of all scripts, names that stay apart, signs that mean something."""

import math

import pytest

from retemper.text import number, pad, shorten, shorten_all, text_width


@pytest.mark.parametrize(
    ("text", "columns"), [("cat", 3), ("猫", 2), ("ｶﾅ", 2), ("🐸", 2), ("e\u0301", 1), ("مطار", 4), ("a\u200db", 2)]
)
def test_a_text_is_as_wide_as_a_terminal_shows_it(text: str, columns: int) -> None:
    assert text_width(text) == columns
    assert text_width(pad(text, 9)) == 9


def test_a_shortened_name_keeps_its_end_and_fits() -> None:
    assert shorten("a short one", 11) == "a short one"
    assert shorten("a class of a long name 7", 12) == "a class …e 7"
    for length in (1, 2, 3, 7, 10):
        assert text_width(shorten("飞机汽车鸟猫鹿狗青蛙马", length)) <= length
    assert shorten("飞机汽车鸟猫", 9) == "飞机汽…猫"


def test_what_could_command_a_terminal_or_turn_a_text_is_taken_out() -> None:
    assert shorten("a\x1b[31mb\u202ec\nd", 40) == "a?[31mb?c d"
    assert shorten("👩\u200d👧", 40) == "👩\u200d👧"  # what joins letters stays
    assert shorten(" \n", 40) == "(no name)"


def test_names_that_would_look_the_same_are_told_apart() -> None:
    names = ["the left wing of a plane", "the left-hand side of a plane", "cat", "Cat", "", " "]
    assert shorten_all(names, 12) == ["0: the le…ne", "1: the le…ne", "cat", "Cat", "4: (no name)", "5: (no name)"]


def test_numbers_have_no_stray_sign_and_none_stands_for_nan() -> None:
    assert [number(value, 1, "+") for value in (0.0, -0.0, -0.04, 0.04, 1.25, -3)] == ["0.0"] * 4 + ["+1.2", "-3.0"]
    assert [number(value, 3) for value in (math.nan, math.inf, -math.inf, 0.5)] == ["none"] * 3 + ["0.500"]
