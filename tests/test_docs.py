"""What the documents say is so."""

import re
from pathlib import Path

import pytest

import retemper.recipes
from retemper.engine.catalogue import method_module
from retemper.engine.cli import parser, run

ROOT = Path(__file__).parent.parent


def blocks(document: str, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)


def test_the_recipe_in_contributing_trains_without_an_edit_elsewhere(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipe,) = blocks("CONTRIBUTING.md", "python")
    (tmp_path / "plain_ard.py").write_text(recipe)
    monkeypatch.setattr(retemper.recipes, "__path__", [*retemper.recipes.__path__, str(tmp_path)])
    assert run(["ls", "plain_ard:digits"]) == 0
    assert "AAAI 2020" in capsys.readouterr().out
    assert len(method_module("plain_ard").SETTINGS) >= 7
    words = ["--teacher", str(teacher), "--out", str(tmp_path / "run"), "--epochs", "1", "--attack-steps", "1"]
    assert run(["train", "plain_ard:digits", "--batch-size", "256", *words]) == 0


def test_the_python_in_the_readme_is_where_it_is_run() -> None:
    """test_wheel.py runs what stands in the section about the kernels, and nothing else."""
    sections = (ROOT / "README.md").read_text().split("\n## ")
    assert [section.splitlines()[0] for section in sections if "```python" in section] == [
        "The kernels in your own code"
    ]


def test_the_commands_in_the_readme_exist() -> None:
    lines = [line.strip() for block in blocks("README.md", "bash") for line in block.splitlines()]
    words = [line.split("#")[0].split() for line in lines if line.startswith("retemper ")]
    assert len(words) >= 5
    for command in words:
        recipe = next((word for word in command if ":" in word), None)
        parser(recipe).parse_args(command[1:])


def test_the_map_in_the_readme_is_the_tree() -> None:
    named = re.findall(r"^\| `(\w+)/` \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    tracked = {"kernels", "loaders", "engine", "recipes", "tests", "benchmarks", "examples"}
    assert set(named) == tracked and all((ROOT / name).is_dir() for name in named)
