"""The architecture in one table: who may import whom, and what no module may do."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "kernels": set(),
    "loaders": set(),
    "engine": {"kernels", "loaders"},
    "recipes": {"engine", "kernels"},  # a recipe's loss is made of kernels
}
GROUND = {"errors", "console", "files", "provenance"}  # modules of src/retemper, which know of nothing above them
BUILDS_ON = {
    "adaiad": {"adaad", "iad"},
    "b_mtard": {"mtard"},
    "fair_ard": {"ard", "fair"},
    "fair_iad": {"ard", "fair", "iad"},
    "fair_mtard": {"fair", "mtard"},
    "fair_rslad": {"fair", "rslad"},
    "iad": {"ard"},
    "label_trust": {"absld"},
}
SOURCES = [source for part in MAY_IMPORT for source in sorted((ROOT / part).rglob("*.py"))]


def imported(source: Path) -> set[str]:
    """Every module that `source` names in an import, at its head or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_point_one_way(part: str) -> None:
    for source in (ROOT / part).rglob("*.py"):
        parts = {name.split(".")[1] for name in imported(source) if name.startswith("retemper.")}
        assert parts - GROUND <= MAY_IMPORT[part] | {part}, source


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(ROOT)))
def test_our_folders_are_only_imported_under_our_name(source: Path) -> None:
    assert not {name.split(".")[0] for name in imported(source)} & MAY_IMPORT.keys()


def test_a_recipe_reads_alone_unless_its_paper_builds_on_another() -> None:
    for source in (ROOT / "recipes").glob("*.py"):
        others = {name.split(".")[2] for name in imported(source) if name.startswith("retemper.recipes.")} - {
            "settings"
        }
        assert others <= BUILDS_ON.get(source.stem, set()), source


def test_every_kernel_has_its_tests() -> None:
    for source in (ROOT / "kernels").glob("*.py"):
        if source.stem != "__init__":
            assert (ROOT / f"tests/kernels/test_{source.stem}.py").is_file(), source


def test_the_import_name_is_four_links() -> None:
    for part in MAY_IMPORT:
        link = ROOT / "src/retemper" / part
        assert link.is_symlink() and link.resolve() == ROOT / part


def test_kernels_and_the_step_read_no_value_on_the_host() -> None:
    waits = {"item", "tolist", "cpu", "nonzero", "numpy", "is_nonzero", "unique", "masked_select"}
    for source in [*(ROOT / "kernels").glob("*.py"), ROOT / "engine/step.py", ROOT / "engine/attack.py"]:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in waits, f"{source}:{node.lineno}"


def test_no_untrusted_code_runs() -> None:
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert name not in {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load"}, f"{source}:{node.lineno}"
            if name == "torch.load":
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert given.get("weights_only") == "True", f"{source}:{node.lineno}"


def test_the_engine_asks_for_no_method_by_name() -> None:
    """It offers abilities, which a recipe declares: nothing in it compares with, or looks up, a method's name."""
    methods = {path.stem for path in (ROOT / "recipes").glob("*.py")} - {"__init__"}
    for source in set((ROOT / "engine").rglob("*.py")) - {ROOT / "engine/demo.py"}:  # which names its three runs
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Compare | ast.match_case | ast.Dict):
                words = {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)}
                assert not words & methods, (source, getattr(node, "lineno", 0), words & methods)
