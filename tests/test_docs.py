"""What the documents say is so: code runs, commands parse, links resolve, names exist, the steps for adding suffice."""

import importlib
import importlib.util
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import retemper.recipes
from retemper.arguments import command_line
from retemper.cli import run
from retemper.engine.catalogue import method_module, methods
from retemper.engine.recipe import GROUPS
from retemper.loaders import DATASETS
from retemper.options import options_of

ROOT = Path(__file__).parent.parent
README, ARCHITECTURE = ROOT / "README.md", ROOT / "docs/architecture.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
KERNEL_PAGES = ROOT / "docs/kernels"  # their code runs from the installed wheel, in test_wheel.py
OTHERS_OPTIONS = {  # of torchrun, pip, apt and kernel-builder
    "--nproc-per-node", "--no-python", "--nnodes", "--node-rank", "--master-addr",
    "--no-build-isolation", "--require-hashes", "--repo-id",
}  # fmt: skip
VERBS = (
    "demo", "ls", "train", "evaluate", "teacher", "even", "report", "compare", "export", "convert", "bench", "doctor"
)  # fmt: skip


def blocks(page: Path, language: str, title: str = "") -> list[str]:
    """The fenced code blocks of a language, with that title or without one."""
    head = re.escape(f'{language} title="{title}"' if title else language)
    return re.findall(rf"^```{head}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its fenced code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def inline_code(page: Path) -> list[str]:
    """Return the texts between backticks, each on one line."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def commands(page: Path) -> list[list[str]]:
    """The commands in a page's bash blocks, as words."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def table_rows(page: Path, heading: str) -> list[list[str]]:
    """The cells of each row of the tables between a heading and the next one."""
    section = re.split(r"^#+ ", page.read_text().partition(f"# {heading}\n")[2], flags=re.MULTILINE)[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if not row[0].startswith("---")][1:]


def named(cell: str) -> str:
    """Return the names between backticks in a cell."""
    return cell.strip("`")


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the package's sources, which a test may add to."""
    for folder in ("engine", "kernels", "loaders", "recipes", "src/retemper"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=ignore)
    return tmp_path


def in_house(house: Path, *words: str) -> None:
    """Run Python in a copy of the sources, on them."""
    env = os.environ | {"PYTHONPATH": str(house / "src")}
    done = subprocess.run([sys.executable, *words], cwd=house, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def edit(path: Path, pattern: str, replacement: str) -> None:
    """Replace the one place of a file that matches."""
    text, count = re.subn(pattern, replacement, path.read_text(), flags=re.MULTILINE)
    assert count == 1, (path, pattern)
    path.write_text(text)


def test_the_readme_fits_on_a_page_and_begins_with_the_two_commands() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    first, *_ = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["make demo", "make test"]


def test_the_map_in_the_readme_is_the_tree() -> None:
    folders = re.findall(r"^\| `(\w+)/` \|", README.read_text(), flags=re.MULTILINE)
    there = {"kernels", "loaders", "engine", "recipes", "tests", "benchmarks", "publish", "examples", "docs"}
    assert set(folders) == there and all((ROOT / name).is_dir() for name in folders)


def test_the_rows_in_the_readme_are_those_of_the_results() -> None:
    results = (ROOT / "benchmarks/results/fairness/fashion_mnist_small/autoattack.md").read_text().splitlines()
    whole = [[cell.strip() for cell in line.strip("|").split("|")][:5] for line in results]
    short = table_rows(README, "What was measured")
    short = short[[row[0] for row in short].index("Fashion-MNIST, AutoAttack") + 1 :]
    assert len(short) >= 4 and all(row in whole for row in short)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, block in enumerate(blocks(page, "python")):
        if page.parent != KERNEL_PAGES and page != ROOT / "CONTRIBUTING.md":  # whose code other tests run
            exec(compile(block, f"{page.name}, block {number}", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    inline = [code.split() for code in inline_code(page) if code.startswith(("make ", "python "))]
    inline += [code.split() for code in inline_code(page) if re.match(r"retemper train [a-z_]+:[a-z]", code)]
    for words in [*commands(page), *inline]:
        if words[0] == "retemper" and "plain_ard:digits" not in words:  # the example of CONTRIBUTING.md
            recipe = next((word for word in words if ":" in word), None) if words[1] == "train" else None
            command_line(recipe)[0].parse_args(words[1:])
        elif words[0] == "make":
            assert words[1] in targets, words
        elif words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), words


def test_the_readme_names_every_verb() -> None:
    named_there = re.findall(r"(\w+)", " ".join([*inline_code(README), *blocks(README, "bash")]))
    assert set(VERBS) <= set(named_there)


def test_every_option_that_the_pages_name_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for words in [[], *([verb] for verb in VERBS)] + [["train", f"{method}:digits"] for method in methods()]:
        with pytest.raises(SystemExit):
            run([*words, "--help"])
    known = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out)) | OTHERS_OPTIONS
    for script in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r"\"(--[a-z][\w-]*)\"", script.read_text()))
    for page in PAGES:
        code = " ".join([*inline_code(page), *blocks(page, "bash")])
        unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) - known
        assert not unknown, (page, unknown)


def test_the_page_on_training_names_every_option_that_all_methods_have() -> None:
    named_there = inline_code(ROOT / "docs" / "training.md")
    options = [f"--{name.replace('_', '-')}" for kind in GROUPS.values() for name in options_of(kind)]
    assert not set(options) - set(named_there)


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        path, _, anchor = " ".join(link.split()).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in slugs(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_the_pages_name_exist(page: Path) -> None:
    of_ours = r"(?:engine|kernels|loaders|recipes|tests|benchmarks|examples|docs|src)/[\w./-]*"
    examples = {"recipes/plain_ard.py", "kernels/row_norm.py", "tests/kernels/test_row_norm.py", "loaders/stripes.py"}
    for code in inline_code(page):
        if re.fullmatch(of_ours, code) and "NAME" not in code and code not in examples:
            assert (ROOT / code).exists(), code


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


def test_every_method_and_data_set_has_its_row() -> None:
    files = set(re.findall(r"`recipes/(\w+)\.py`", (ROOT / "docs/methods.md").read_text()))
    assert files - {"fair", "igdm"} == set(methods())
    assert [named(row[0]) for row in table_rows(ROOT / "docs/settings.md", "Data sets")] == list(DATASETS)


def test_the_reference_documents_what_exists_and_what_the_kernels_offer() -> None:
    pages = [page.read_text() for page in sorted((ROOT / "docs/reference").glob("*.md"))]
    names = re.findall(r"^::: ([\w.]+)$", "\n".join(pages), flags=re.MULTILINE)
    for name in names:
        module, _, attribute = name.rpartition(".")
        documented = getattr(importlib.import_module(module), attribute)
        assert inspect.getdoc(documented) and not inspect.ismodule(documented), name
    offered = {name for name in importlib.import_module("retemper.kernels").__all__ if not name.endswith("_reference")}
    assert offered <= {name.rpartition(".")[2] for name in names}


def test_documented_arguments_are_the_functions_own() -> None:
    """Each name that `Args:` describes, as in "step, eps: ...", is a parameter."""
    for page in sorted((ROOT / "docs/reference").glob("*.md")):
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), flags=re.MULTILINE):
            module, _, attribute = name.rpartition(".")
            function = getattr(importlib.import_module(module), attribute)
            if inspect.isfunction(function):
                section = (inspect.getdoc(function) or "").partition("\nArgs:\n")[2]
                section = re.split(r"^\S", section, flags=re.MULTILINE)[0]
                described = re.findall(r"^ {4}([\w, ]+):", section, flags=re.MULTILINE)
                given = {word for words in described for word in words.split(", ")}
                assert given <= set(inspect.signature(function).parameters), name


def test_the_picture_of_the_layers_is_todays() -> None:
    spec = importlib.util.spec_from_file_location("layers", ROOT / "docs/layers.py")
    assert spec is not None and spec.loader is not None
    sys.modules["layers"] = layers = importlib.util.module_from_spec(spec)  # its dataclass looks its module up
    spec.loader.exec_module(layers)
    for path, text in layers.made().items():
        assert path.read_text() == text, f"{path} is not what the code says: run python docs/layers.py"


def test_the_recipe_in_contributing_trains_without_an_edit_elsewhere(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named(table_rows(ARCHITECTURE, "How to add a method")[0][0]) == "recipes/NAME.py"
    (recipe,) = blocks(ROOT / "CONTRIBUTING.md", "python")
    assert len(recipe.splitlines()) <= 35
    (tmp_path / "plain_ard.py").write_text(recipe)
    monkeypatch.setattr(retemper.recipes, "__path__", [*retemper.recipes.__path__, str(tmp_path)])
    assert run(["ls", "plain_ard:digits"]) == 0
    assert "AAAI 2020" in capsys.readouterr().out
    assert len(method_module("plain_ard").SETTINGS) >= 7
    words = ["--teacher", str(teacher), "--out", str(tmp_path / "run"), "--epochs", "1", "--attack-steps", "1"]
    assert run(["train", "plain_ard:digits", "--batch-size", "256", *words]) == 0


def test_a_kernel_takes_the_files_that_the_architecture_says(house: Path) -> None:
    steps = [named(row[0]).replace("NAME", "row_norm") for row in table_rows(ARCHITECTURE, "How to add a kernel")]
    assert steps[:3] == ["kernels/row_norm.py", "kernels/__init__.py", "tests/kernels/test_row_norm.py"]
    for step in (steps[0], steps[2]):
        (block,) = blocks(ARCHITECTURE, "python", step)
        (house / step).parent.mkdir(parents=True, exist_ok=True)
        (house / step).write_text(block)
    for shared in ("tests/conftest.py", "tests/kernels/conftest.py"):
        shutil.copy(ROOT / shared, house / shared)
    edit(
        house / steps[1],
        r"^__all__ = \[",
        'from retemper.kernels.row_norm import row_norm\n\n__all__ = [\n    "row_norm",',
    )
    in_house(
        house, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", "--rootdir", ".", steps[2]
    )


def test_a_data_set_takes_the_files_that_the_architecture_says(house: Path) -> None:
    steps = [named(row[0]).replace("NAME", "stripes") for row in table_rows(ARCHITECTURE, "How to add a data set")]
    assert steps[:2] == ["loaders/stripes.py", "loaders/datasets.py"]
    (reader,), (line,) = (blocks(ARCHITECTURE, "python", step) for step in steps[:2])
    (house / steps[0]).write_text(reader)
    datasets = house / steps[1]
    edit(datasets, r"^DATASETS = \(", 'DATASETS = ("stripes", ')
    edit(datasets, r"^(from retemper\.loaders\.views .*)$", r"from retemper.loaders.stripes import load_stripes\n\1")
    indented = "".join(f"    {text}\n" for text in line.splitlines())
    edit(datasets, r"^(def _load\(.*\) -> Split:\n(?:    \"\"\".*\"\"\"\n)?)", rf"\1{indented}")
    short = "--epochs 1 --attack-steps 1 --select-steps 1 --batch-size 64".split()
    in_house(house, "-m", "retemper", "train", "sat:digits", "--dataset", "stripes", "--out", "run", *short)
