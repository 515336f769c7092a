"""Compile every kernel for one architecture, as the ops launch them; print what each takes and spills, a JSON a line.

Run by test_compiles.py in a process of its own, since the one with the tests may be interpreting:
    python compile_all.py cuda 90 32
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from retemper.kernels.runtime import EXACT, pixel_block

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# what a call may leave out takes turns with the dtypes: every branch is compiled, without every combination
OPTIONAL = {"fp32": None, "fp16": "*fp32", "bf16": "*fp32"}

kl = import_module("retemper.kernels.class_temperature_kl")
sums = import_module("retemper.kernels.class_sums")
pgd = import_module("retemper.kernels.pgd_step")
start = import_module("retemper.kernels.random_start")
views = import_module("retemper.kernels.augment")

Case = tuple[Any, dict[str, str], dict[str, Any]]  # a kernel; the types of its arguments; its constants


def elementwise(dtype: str) -> Iterator[Case]:
    image = f"*{dtype}"
    types = dict.fromkeys(["adv_ptr", "grad_ptr", "clean_ptr"], image) | dict.fromkeys(
        ["step", "eps", "lower", "upper", "scale"], "fp32"
    )
    types |= {"pixels": "i32", "blocks": "i32", "seed_ptr": "*i64", "step_ptr": "*fp32", "eps_ptr": "*fp32"}
    absent = {} if OPTIONAL[dtype] else {"step_ptr": None, "eps_ptr": None}
    block = {"BLOCK": pixel_block(3 * 32 * 32)}
    yield pgd._linf_kernel, types, absent | block
    yield pgd._l2_kernel, types, absent | block | {"PIXELS": 3 * 32 * 32}
    for uniform in (True, False):
        yield start._random_start_kernel, types, absent | block | {"UNIFORM": uniform, "CLIP": dtype != "fp16"}


def by_class(dtype: str) -> Iterator[Case]:
    types = {"label_ptr": "*i64", "temperature_ptr": "*fp32", "student_temperature": "fp32", "B": "i32"}
    types |= dict.fromkeys(["student_stride", "teacher_stride", "row_grad_stride", "out_stride", "stride"], "i32")
    types |= {"student_ptr": f"*{dtype}", "teacher_ptr": "*bf16", "logits_ptr": f"*{dtype}"}
    types |= {"weight_ptr": "*fp32", "row_grad_ptr": "*fp32", "loss_ptr": "*fp32", "count_ptr": "*i32"}
    absent = {} if OPTIONAL[dtype] else {"weight_ptr": None, "row_grad_ptr": None}
    for classes in (10, 100, 1000):
        for grad in (True, False):
            out = {"out_ptr": f"*{dtype}" if grad else "*fp32"}
            yield kl._kl_kernel, types | out, absent | kl.row_tiles(classes) | {"GRAD": grad}
    for classes in (10, 100):
        yield sums._class_sums_kernel, types, sums.sum_tiles(classes)


def augmentation(dtype: str) -> Iterator[Case]:
    types = {"image_ptr": "*u8", "view_ptr": "*i64", "index_ptr": "*i64", "out_ptr": f"*{dtype}"}
    types |= {"N": "i32", "blocks": "i32"}
    absent = {} if OPTIONAL[dtype] else {"index_ptr": None}
    for side, channels in ((32, 3), (28, 1)):
        shape = {"HEIGHT": side, "WIDTH": side, "CHANNELS": channels, "PADDING": 4}
        yield views._augment_kernel, types, absent | shape | {"BLOCK": pixel_block(side * side * channels)}


def compile_case(case: Case, target: GPUTarget) -> Any:
    kernel, types, constants = case
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = {  # as PyTorch allocates, and as whole images are long
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name == "pixels"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options={"num_warps": 4, **EXACT})


def usage(compiled: Any, target: GPUTarget) -> dict[str, int]:
    """Registers, and bytes or registers spilled, as the vendor's own tools report them."""
    if target.backend == "hip":
        fields = re.findall(
            r"\.(vgpr_count|private_segment_fixed_size|[sv]gpr_spill_count):\s*(\d+)", compiled.asm["amdgcn"]
        )
        return {name: int(number) for name, number in fields}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True)
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report.stdout + report.stderr)}


def main(backend: str, arch: str, warp_size: str) -> None:
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp_size))
    for dtype in OPTIONAL:
        for case in (*elementwise(dtype), *by_class(dtype), *augmentation(dtype)):
            compiled = compile_case(case, target)
            print(json.dumps({"kernel": case[0].__name__, "dtype": dtype, "usage": usage(compiled, target)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
