"""The index of the recipes says what the recipes say, and is made anew where they have changed."""

import json
from pathlib import Path

import pytest

import retemper.recipes
from retemper import index
from retemper.cli import run
from retemper.engine.catalogue import find_setting, method_module, methods
from retemper.errors import UsageError
from retemper.options import parse_value


def test_the_file_is_of_these_recipes() -> None:
    assert json.loads(index.FILE.read_text()) == json.loads(json.dumps(index.make_index())), (
        "a recipe or an option has changed: run  python -m retemper.index"
    )


def test_it_knows_every_setting_and_what_its_options_may_be() -> None:
    listed = index.read_index().methods
    assert {method: list(settings) for method, settings in listed.items()} == {
        method: list(method_module(method).SETTINGS) for method in methods()
    }
    for one in (one for settings in listed.values() for one in settings.values()):
        _, _, setting = find_setting(one.name)
        options = setting.recipe.options()
        assert one.options.keys() == one.values.keys() == options.keys()
        for name, value in setting.recipe.flat().items():
            group, option = one.options[name]
            assert (group, option.help, option.choices) == (
                options[name][0],
                options[name][1].help,
                options[name][1].choices,
            )
            assert parse_value(option.kind, one.values[name]) == pytest.approx(value), (one.name, name)


@pytest.mark.parametrize("name", ["abld:digits", "absld:digit", "absld", "absld:", ""])
def test_what_is_unknown_is_told_as_the_recipes_would(name: str) -> None:
    with pytest.raises(UsageError) as by_recipes:
        find_setting(name)
    with pytest.raises(UsageError) as by_index:
        index.read_index().find(name)
    assert str(by_index.value) == str(by_recipes.value)


@pytest.mark.parametrize("content", ["", "[", "[]", "null", '{"sources": "of another version"}', None])
def test_a_file_of_other_recipes_is_not_believed(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is None:
        content = json.dumps({"sources": index.sources_digest()})
    (tmp_path / "index.json").write_text(content)
    monkeypatch.setattr(index, "FILE", tmp_path / "index.json")
    index._read_index.cache_clear()
    try:
        assert index.read_index().find("absld:digits").values["epochs"] == "20"
    finally:
        index._read_index.cache_clear()


@pytest.mark.parametrize("code", ["def broken(:", "raise SystemExit(0)", "import nowhere"])
def test_a_recipe_file_that_cannot_be_imported_is_told_of_and_left_out(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"broken_{len(code)}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setattr(retemper.recipes, "__path__", [*retemper.recipes.__path__, str(tmp_path)])
    assert run(["ls", "absld:digits"]) == 0
    told = capsys.readouterr()
    assert "absld:digits" in told.out and told.err.count(f"recipes/{name}.py is left out") == 1
