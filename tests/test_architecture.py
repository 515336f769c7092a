"""The architecture: who may import whom, as the contract in pyproject.toml says, and what no module may do."""

import ast
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest
from importlinter.api import read_configuration

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "loaders", "engine", "recipes")
LINKS = {part: part for part in FOLDERS} | {"bench": "benchmarks/bench"}
BUILDS_ON = {
    "adr": {"sat"},
    "adaiad": {"adaad", "iad"},
    "b_mtard": {"mtard"},
    "csr_control": {"trades"},
    "dgad": {"adaad"},
    "fair_ard": {"ard", "fair"},
    "fair_iad": {"ard", "fair", "iad"},
    "fair_mtard": {"fair", "mtard"},
    "fair_rslad": {"fair", "rslad"},
    "fair_tat": {"cfa"},
    "group_dro": {"sat"},
    "iad": {"ard"},
    "label_trust": {"absld"},
    "rebat": {"sat"},
    "saad": {"adaad"},
}
# They read values, of tensors that they have found to be a CPU's.
ON_A_CPU = {"_all_hold", "_all_known", "_rows_with", "to_normal"}
SOURCES = [source for part in LINKS.values() for source in sorted((ROOT / part).rglob("*.py"))]


def imported(source: Path) -> set[str]:
    """Return every module that `source` names in an import, at its head or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Hold the sources in a folder to the import contract in its pyproject.toml."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    env = os.environ | {"PYTHONPATH": str(folder / "src")}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_imports_follow_the_contract() -> None:
    linted = lint(ROOT)
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_the_contract_ignores_nothing_and_places_every_part() -> None:
    contracts = read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"]
    assert not any("ignore_imports" in contract for contract in contracts)
    placed = {name.strip(" ()") for contract in contracts for row in contract["layers"] for name in row.split("|")}
    modules = grimp.build_graph("retemper", cache_dir=None).modules - {"retemper", "retemper.engine"}
    for module in modules:
        assert any(module == name or module.startswith(f"{name}.") for name in placed), f"{module} is in no layer"


def test_every_folder_is_a_package() -> None:
    """The linter does not see what lies in a folder without `__init__.py`."""
    for source in SOURCES:
        assert (source.parent / "__init__.py").is_file(), source


def test_no_module_imports_itself_through_others() -> None:
    graph = grimp.build_graph("retemper", cache_dir=None)
    TopologicalSorter({module: graph.find_modules_directly_imported_by(module) for module in graph.modules}).prepare()


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(ROOT)))
def test_our_folders_are_only_imported_under_our_name(source: Path) -> None:
    assert not {name.split(".")[0] for name in imported(source)} & set(FOLDERS)


def test_a_recipe_reads_alone_unless_its_paper_builds_on_another() -> None:
    for source in (ROOT / "recipes").glob("*.py"):
        others = {name.split(".")[2] for name in imported(source) if name.startswith("retemper.recipes.")}
        assert others - {"settings", "data_sets", "igdm"} <= BUILDS_ON.get(source.stem, set()), source


def test_every_kernel_has_its_tests() -> None:
    for source in (ROOT / "kernels").glob("*.py"):
        if source.stem != "__init__":
            assert (ROOT / f"tests/kernels/test_{source.stem}.py").is_file(), source


def test_the_import_name_is_links() -> None:
    for part, folder in LINKS.items():
        link = ROOT / "src/retemper" / part
        assert link.is_symlink() and link.resolve() == ROOT / folder


def test_kernels_and_the_step_read_no_value_on_the_host() -> None:
    waits = {"item", "tolist", "cpu", "nonzero", "numpy", "is_nonzero", "unique", "masked_select"}
    engine = [ROOT / f"engine/{name}.py" for name in ("step", "attack", "attack_plan")]
    for source in [*(ROOT / "kernels").glob("*.py"), *engine]:
        module = ast.parse(source.read_text())
        for function in [node for node in module.body if getattr(node, "name", None) in ON_A_CPU]:
            assert re.search("is_cpu|'cpu'", ast.unparse(function)), "it must ask where its tensor is"
            module.body.remove(function)
        for node in ast.walk(module):
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
    """The engine offers abilities, which a recipe declares: nothing in it compares with a method's name."""
    methods = {path.stem for path in (ROOT / "recipes").glob("*.py")} - {"__init__", "settings"}
    for source in set((ROOT / "engine").rglob("*.py")) - {ROOT / "engine/demo.py"}:  # which names its three runs
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Compare | ast.match_case | ast.Dict):
                words = {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)}
                assert not words & methods, (source, getattr(node, "lineno", 0), words & methods)
