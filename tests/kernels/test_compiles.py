"""Every kernel compiles for GPUs that need not be here, and spills no register on any of them."""

import ast
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "kernels"
Target = tuple[str, str, str]  # backend, architecture, threads in a warp
TARGETS: list[Target] = [("cuda", "80", "32"), ("cuda", "90", "32"), ("cuda", "100", "32"), ("hip", "gfx942", "64")]
SPILLS = {
    "cuda": {"STACK", "LOCAL"},
    "hip": {"private_segment_fixed_size", "sgpr_spill_count", "vgpr_spill_count"},
}


def entry_points() -> set[str]:
    """The jit functions that an op launches: those whose names end so."""
    functions = (node for file in KERNELS.glob("*.py") for node in ast.walk(ast.parse(file.read_text())))
    return {f.name for f in functions if isinstance(f, ast.FunctionDef) and f.name.endswith("_kernel")}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[Target, subprocess.CompletedProcess[str]]:
    """What compile_all.py says of each target, each in a process and with an empty cache of its own."""

    def report(target: Target) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", str(HERE / "compile_all.py"), *target]
        env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp(target[1]))}
        return subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(TARGETS, pool.map(report, TARGETS), strict=True))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target[1])
def test_compiles_without_spills(target: Target, reports: dict[Target, subprocess.CompletedProcess[str]]) -> None:
    assert reports[target].returncode == 0
    compiled = [json.loads(line) for line in reports[target].stdout.splitlines()]
    assert {case["kernel"] for case in compiled} == entry_points()
    for case in compiled:
        assert case["usage"].keys() > SPILLS[target[0]]
        assert not any(case["usage"][name] for name in SPILLS[target[0]]), case
