"""No file is trusted: what could run code out of one is named here, and the whole source is walked for it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    path for part in ("engine", "kernels", "loaders", "recipes", "benchmarks", "examples")
    for path in sorted((ROOT / part).rglob("*.py"))
]  # fmt: skip
MODULES = {  # that run what they read, fetch from a network, or unpack archives to a disk; and where they are let in
    **dict.fromkeys(["dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "code", "runpy"], ()),
    **dict.fromkeys(["urllib", "requests", "http", "socket", "ftplib"], ()),
    "tarfile": ("benchmarks/gpu_images.py",),  # reads images out of an archive, and unpacks nothing
    # a reader that knows five names; the errors of torch.load
    "pickle": ("loaders/pickles.py", "engine/checkpoints/content.py"),
}
CALLS = {  # the end of a dotted name, and where it is let in
    **dict.fromkeys(["eval", "exec", "compile", "__import__", "system", "popen", "unpack_archive"], ()),
    **dict.fromkeys(["extract", "extractall"], ()),
    **dict.fromkeys(["all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"], ()),
    "spec_from_file_location": ("engine/checkpoints/external.py",),  # the user's own file, named by the user
}
METHODS = {"eval", "compile"}  # as in model.eval(), torch.compile and re.compile: something else behind a dot


def dotted(node: ast.expr) -> str:
    """Return the dotted name of an expression, a.b.c; "" before the dot where that is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def has(call: ast.Call, name: str, value: object) -> bool:
    """Say whether a call gives a keyword as this very constant."""
    return any(k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords)


def offences(source: str, where: str) -> Iterator[str]:
    """Return the forbidden things that a module does, as "line: what"."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in imported:
                if where not in MODULES.get(name.split(".")[0], (where,)):
                    yield f"{node.lineno}: imports {name}"
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        last = name.split(".")[-1]
        if last in CALLS and where not in CALLS[last] and not (last in METHODS and "." in name):
            yield f"{node.lineno}: calls {name}"
        if last == "load" and name.startswith("torch.") and not has(node, "weights_only", True):
            yield f"{node.lineno}: {name} without weights_only=True"
        if last in ("load", "loads", "Unpickler") and name.startswith("pickle.") and where != "loaders/pickles.py":
            yield f"{node.lineno}: calls {name}"
        if name.startswith("torch.hub") or name.startswith("torch.package"):
            yield f"{node.lineno}: calls {name}"
        for option in ("shell", "allow_pickle"):
            if has(node, option, True):
                yield f"{node.lineno}: {name}({option}=True)"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_can_be_made_to_run_a_file(path: Path) -> None:
    assert not list(offences(path.read_text(), str(path.relative_to(ROOT))))


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "import pickle",
        "from pickle import loads",
        "import yaml",
        "eval(text)",
        "exec(text)",
        "compile(text, name, 'exec')",
        "os.system(line)",
        "subprocess.run(line, shell=True)",
        "np.load(path, allow_pickle=True)",
        "import tarfile",
        "archive.extractall(folder)",
        "torch.hub.load(name)",
        "from urllib.request import urlopen",
        "dist.broadcast_object_list(objects)",
        "importlib.util.spec_from_file_location(name, path)",
    ],
)
def test_the_walk_sees(line: str) -> None:
    assert list(offences(line, "engine/any.py"))


def test_what_is_safe_is_left_alone() -> None:
    safe = "torch.load(path, weights_only=True); model.eval(); torch.compile(f); re.compile(x); json.loads(text)"
    assert not list(offences(safe, "engine/any.py"))
