"""Templates are filled in safely: HTML is escaped, nothing is left out in silence."""

from pathlib import Path

import jinja2
import pytest

from retemper.templates import render


@pytest.mark.parametrize(
    "name, written", [("a.html.jinja", "&lt;b&gt; twice: &lt;b&gt;&lt;b&gt;\n"), ("a.md.jinja", "<b> twice: <b><b>\n")]
)
def test_what_stands_in_html_is_escaped_and_nothing_else(name: str, written: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{{ text }} twice: {{ text|twice }}\n")
    assert render(tmp_path, name, {"twice": lambda text: text * 2}, text="<b>") == written


def test_an_unknown_name_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.md.jinja").write_text("{{ nobody_gave_this }}")
    with pytest.raises(jinja2.UndefinedError, match="nobody_gave_this"):
        render(tmp_path, "a.md.jinja")


def test_lines_with_nothing_but_a_statement_leave_no_line(tmp_path: Path) -> None:
    (tmp_path / "a.md.jinja").write_text(
        "{% for word in words %}\n  {% if word %}\n- {{ word }}\n  {% endif %}\n{% endfor %}\nend\n"
    )
    assert render(tmp_path, "a.md.jinja", words=["one", "", "two"]) == "- one\n- two\nend\n"
