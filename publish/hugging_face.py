"""Writes the kernels as a repository of kernels for the Hugging Face Hub.

    make hf-kernel                           # into dist/hf-kernel
    python publish/hugging_face.py FOLDER    # into FOLDER, which must not exist or be empty

The folder holds what their kernel-builder takes (build.toml, flake.nix, CARD.md, torch-ext/), and what it would make of
that (build/torch-BACKEND): the kernels need no compiler before they run, so that `kernels.get_local_kernel` loads the
folder, and `kernel-builder upload --repo-id ORGANISATION/retemper-kernels FOLDER` publishes it.

Of their rules three change the sources: a module imports its neighbours by relative names, since it is loaded under any
name; operators live in a namespace that no other build has, since several builds may be loaded into one process; and
`_ops.py` says which, since their builder writes one too.
"""

import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME, MODULE = "retemper-kernels", "retemper_kernels"
VERSION = 1  # rises when a call that worked no longer does
BACKENDS = ("cpu", "cuda", "rocm")
BUILD = f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "MIT"
backends = {json.dumps(BACKENDS)}

[torch-noarch]
"""
OPS = '''"""The namespace of the operators of this build, which no other build has."""

import torch

NAMESPACE = "{namespace}"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """Return the name under which PyTorch knows an operator of this build."""
    return f"{{NAMESPACE}}::{{op_name}}"
'''
OWN_NAMESPACE = (
    'from ._ops import add_op_namespace_prefix\n\nNAMESPACE = add_op_namespace_prefix("").removesuffix("::")'
)


def main(folder: Path) -> None:
    """Write the repository into a folder."""
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder}: is not empty; name another folder, or empty it")
    sources = {path.name: standalone(path) for path in sorted((ROOT / "kernels").glob("*.py"))}
    unique = hashlib.sha256("".join(sources.values()).encode()).hexdigest()[:7]
    write(folder / "torch-ext" / MODULE, sources)
    write(folder, {"build.toml": BUILD})
    for path in (ROOT / "LICENSE", *(ROOT / "publish/hugging-face").iterdir()):
        shutil.copy(path, folder)
    for backend in BACKENDS:
        namespace = f"_{MODULE}_{backend}_{unique}"
        files = sources | {"_ops.py": OPS.format(namespace=namespace)}
        files["metadata.json"] = metadata(namespace, backend, files)
        write(folder / "build" / f"torch-{backend}", files)


def standalone(path: Path) -> str:
    """Return a module's source with relative imports and, where operators are registered, a namespace of its own."""
    source = path.read_text()
    source = re.sub(r"^( *)from retemper\.kernels import ", r"\1from . import ", source, flags=re.MULTILINE)
    source = re.sub(r"^( *)from retemper\.kernels\.", r"\1from .", source, flags=re.MULTILINE)
    if path.name == "operators.py":
        source, found = re.subn(r'^NAMESPACE = "retemper"', OWN_NAMESPACE, source, flags=re.MULTILINE)
        if found != 1:
            raise SystemExit(f'{path}: has {found} lines NAMESPACE = "retemper"; needs one')
    if left := re.search(r"^ *(from|import) retemper.*", source, flags=re.MULTILINE):
        raise SystemExit(f"{path}: {left[0].strip()}: write from retemper.kernels.MODULE import NAME")
    return source


def metadata(namespace: str, backend: str, files: dict[str, str]) -> str:
    """Return what metadata.json says of a build: what it is, and the digests of its files."""
    digests = {name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in files.items()}
    what = {"name": NAME, "id": namespace, "version": VERSION, "license": "MIT", "python-depends": []}
    of_files = {"algorithm": "sha256", "files": dict(sorted(digests.items()))}
    return json.dumps(what | {"backend": {"type": backend}, "digest": of_files}, indent=2) + "\n"


def write(folder: Path, files: dict[str, str]) -> None:
    """Write text files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
