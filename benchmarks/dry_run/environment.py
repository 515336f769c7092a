"""The recorder, built for this Python's PyTorch, and a process that runs on it.

`recorder/` is C++ that stands in for CUDA, cuBLAS and cuDNN. Its headers come with the packages that a CUDA build of
PyTorch installs, so that no CUDA toolkit is needed; g++ is.
"""

import hashlib
import os
import subprocess
import sysconfig
from collections.abc import Mapping
from pathlib import Path

SOURCES = Path(__file__).with_name("recorder")
ROOT = Path(__file__).resolve().parents[2]
HEADERS = ("cuda.h", "cuda_runtime_api.h", "crt/host_defines.h", "cudnn_graph.h")
LIBRARY = "libcuda.so.1"  # the name by which Triton and PyTorch look for the driver
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-shared", "-w", f"-Wl,-soname,{LIBRARY}"]


class Unavailable(Exception):
    """What the recorder is built from is not there."""


def header_folders() -> list[Path]:
    """Return the folders of installed packages that hold `HEADERS`, NVIDIA's own before Triton's copy.

    Raises:
        Unavailable: a header is in none: this Python has no CUDA build of PyTorch.
    """
    packages = Path(sysconfig.get_path("purelib"))
    places = [*sorted(packages.glob("nvidia/*/include")), packages / "triton/backends/nvidia/include"]
    folders: list[Path] = []
    for header in HEADERS:
        holding = next((place for place in places if (place / header).is_file()), None)
        if holding is None:
            raise Unavailable(f"{packages} has no {header}: it takes a CUDA build of PyTorch")
        if holding not in folders:
            folders.append(holding)
    return folders


def built(folder: Path) -> Path:
    """Build the recorder under `folder` unless that is done, and return the folder of the library.

    Raises:
        Unavailable: headers or the compiler are missing, or it does not compile.
    """
    headers, sources = header_folders(), sorted(SOURCES.iterdir())
    content = b"".join([*(source.read_bytes() for source in sources), *(bytes(one) for one in headers)])
    own = folder / hashlib.sha256(content + " ".join(FLAGS).encode()).hexdigest()[:16]
    if not (own / LIBRARY).is_file():
        own.mkdir(parents=True, exist_ok=True)
        partial = own / f"partial-{os.getpid()}.so"
        compile_library([source for source in sources if source.suffix == ".cpp"], headers, partial)
        (own / LIBRARY.removesuffix(".1")).symlink_to(LIBRARY)
        partial.rename(own / LIBRARY)
    return own


def compile_library(sources: list[Path], headers: list[Path], to: Path) -> None:
    """Make a shared library of C++ sources, with headers of these folders.

    Raises:
        Unavailable: there is no compiler, or it refuses them.
    """
    includes = [word for folder in headers for word in ("-I", str(folder))]
    command = ["g++", *FLAGS, *includes, *map(str, sources), "-o", str(to)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise Unavailable("g++ is not installed: it builds the recorder") from None
    if done.returncode:
        raise Unavailable(f"the recorder does not compile:\n{done.stderr}")


def on_recorder(library: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process whose CUDA is the recorder, and which finds this checkout's sources.

    Args:
        library: the folder that `built` returns.
        env: the environment to begin with.
    """
    paths = [str(library), *filter(None, [env.get("LD_LIBRARY_PATH")])]
    python = [str(ROOT / "src"), str(ROOT / "benchmarks"), *filter(None, [env.get("PYTHONPATH")])]
    return {
        "TRITON_CACHE_DIR": str(library.parent / "triton"),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        **env,
        "LD_PRELOAD": str(library / LIBRARY),
        "LD_LIBRARY_PATH": ":".join(paths),
        "TRITON_LIBCUDA_PATH": str(library),
        "PYTHONPATH": ":".join(python),
    }
