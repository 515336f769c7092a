"""Every kernel compiles for GPUs that need not be here, and spills no register on any of them."""

import ast
import json
import os
import subprocess
import sys
from math import gcd
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.triton
HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "kernels"
Target = tuple[str, str, str]  # backend, architecture, threads in a warp
# those with all cases first, so that two processes end together
TARGETS: list[Target] = [("hip", "gfx942", "64"), ("cuda", "90", "32"), ("cuda", "80", "32"), ("cuda", "100", "32")]
SPILLS = {
    "cuda": {"STACK", "LOCAL"},
    "hip": {"private_segment_fixed_size", "sgpr_spill_count", "vgpr_spill_count"},
}
SIZE = {"fp32": 4, "bf16": 2}
LOADS_WIDE = {
    "_linf_kernel",
    "_l2_kernel",
    "_momentum_kernel",
    "_uniform_start_kernel",
    "_normal_start_kernel",
    "_ball_start_kernel",
    "_kl_kernel",
    "_js_kernel",
    "_pair_kernel",
    "_class_sums_kernel",
    "_row_losses_kernel",
    "epilogue_kernel",
    "epilogue_grad_kernel",
    "_moments_kernel",
    "_batch_norm_kernel",
    "_batch_norm_sums_kernel",
    "_batch_norm_grad_kernel",
}
WRITES_FEW = {
    "_class_sums_kernel",
    "_row_losses_kernel",
    "_moments_kernel",
    "_batch_norm_sums_kernel",
}  # a number a class, row or channel
# The loads of the first are of a byte each, wherever the crop begins; those of the others are of single weights too.
STORES_WIDE = LOADS_WIDE - WRITES_FEW | {"_augment_kernel", "_strong_augment_kernel", "_resized_crop_kernel"}
STORES_WIDE |= {"_depthwise_kernel", "_depthwise_grad_kernel"}
STATISTICS = 5  # what batch norm stores of each channel beside its images, and the count of batches
SCALARS = 7  # what a kernel loads beside its tensors: a row's label, temperature, weights, trust, own logit, gradient


def jit_functions() -> list[ast.FunctionDef]:
    """Every function of the kernels' modules that Triton compiles."""
    nodes = (node for file in KERNELS.glob("*.py") for node in ast.walk(ast.parse(file.read_text())))
    found = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    return [f for f in found if any(ast.unparse(decorator) == "triton.jit" for decorator in f.decorator_list)]


def entry_points() -> set[str]:
    """The jit functions that an op launches: those whose names end so."""
    return {function.name for function in jit_functions() if function.name.endswith("_kernel")}


def test_no_annotation_of_a_kernel_names_what_triton_refuses() -> None:
    """Triton takes Python 3.10's `typing.Any` for a function that is no kernel, and compiles nothing that names it."""
    assert len(jit_functions()) > len(entry_points())
    for function in jit_functions():
        annotations = [argument.annotation for argument in function.args.args] + [function.returns]
        named = {ast.unparse(one) for one in annotations if one is not None and not isinstance(one, ast.Constant)}
        assert named <= {"tl.constexpr"}, f"{function.name}: quote {named}"


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[Target, list[dict[str, Any]]]:
    """Return what compile_all.py reports of each target, compiled anew."""
    folder = tmp_path_factory.mktemp("reports")
    command = [sys.executable, "-W", "error", str(HERE / "compile_all.py"), str(folder), *map(":".join, TARGETS)]
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    return {target: [*map(json.loads, (folder / target[1]).read_text().splitlines())] for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target[1])
def test_compiles_without_spills(target: Target, reports: dict[Target, list[dict[str, Any]]]) -> None:
    cases = reports[target]
    assert {case["kernel"] for case in cases} == entry_points()
    for case in cases:
        assert case["usage"].keys() > SPILLS[target[0]]
        assert not any(case["usage"][name] for name in SPILLS[target[0]]), case


def is_wide(counts: dict[str, int], width: int, narrower: int = 0) -> bool:
    """Say whether the accesses are of `width` bits, but for a few."""
    return max(map(int, counts)) >= width and sum(n for bits, n in counts.items() if int(bits) < width) <= narrower


def test_memory_is_accessed_in_words_of_16_bytes(reports: dict[Target, list[dict[str, Any]]]) -> None:
    """Rows that 16 bytes do not divide have the widest words that do: 10 classes of fp32 are five words of 8 bytes."""
    seen = set()
    for case in reports["cuda", "90", "32"]:
        if not case["wide"]:
            continue
        size = SIZE[case["dtype"]]
        width = 8 * size * gcd(case["row"], 16 // size)
        if case["kernel"] in LOADS_WIDE:
            assert is_wide(case["ld"], width, SCALARS), case
            seen.add(case["kernel"])
        if case["kernel"] in STORES_WIDE and not case["writes_rows"]:
            assert is_wide(case["st"], width, STATISTICS if "batch_norm" in case["kernel"] else 0), case
            seen.add(case["kernel"])
    assert seen == LOADS_WIDE | STORES_WIDE
