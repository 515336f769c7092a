"""Compile every kernel for some architectures, as the ops launch them; write what each takes and spills.

Run by test_compiles.py in a process of its own, since the one with the tests may be interpreting; each architecture has
a fork of it, and in the folder a file of its name with a JSON a line:
    python compile_all.py FOLDER cuda:90:32 hip:gfx942:64
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from math import gcd
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from retemper.kernels.language import next_power_of_2
from retemper.kernels.runtime import EXACT

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# What a call may leave out and whether it is aligned take turns with the dtypes: every branch is compiled, without
# every combination. Aligned is as PyTorch allocates and as whole images are long; otherwise nothing divides anything.
OPTIONAL = {"fp32": None, "fp16": "*fp32", "bf16": "*fp32"}
ALIGNED = {"fp32": True, "fp16": False, "bf16": True}
SIZE = {"fp32": 4, "fp16": 2, "bf16": 2}

kl = import_module("retemper.kernels.kl_divergence")
rows = import_module("retemper.kernels.logit_rows")
sums = import_module("retemper.kernels.class_sums")
js = import_module("retemper.kernels.jensen_shannon")
pgd = import_module("retemper.kernels.pgd_step")
start = import_module("retemper.kernels.random_start")
views = import_module("retemper.kernels.augment")
after = import_module("retemper.kernels.epilogue")

Case = tuple[Any, dict[str, str], dict[str, Any]]  # a kernel; the types of its arguments; its constants


def elementwise(dtype: str) -> Iterator[Case]:
    image = f"*{dtype}"
    types = dict.fromkeys(["adv_ptr", "grad_ptr", "clean_ptr"], image) | dict.fromkeys(
        ["step", "eps", "lower", "upper", "scale"], "fp32"
    )
    types |= {"pixels": "i32", "blocks": "i32", "seed_ptr": "*i64", "step_ptr": "*fp32", "eps_ptr": "*fp32"}
    absent = {} if OPTIONAL[dtype] else dict.fromkeys(["step_ptr", "eps_ptr", "blocks"])
    yield pgd._linf_kernel, types, absent | {"BLOCK": pgd.BLOCK}
    yield pgd._l2_kernel, types, absent | {"BLOCK": pgd.BLOCK, "PIXELS": 3 * 32 * 32}
    types |= {"first_row": "i32", "rows_apart": "i32"}
    absent |= dict.fromkeys(["first_row", "rows_apart"]) if absent else {}
    for uniform in (True, False):
        draw = {"BLOCK": start.BLOCK, "UNIFORM": uniform, "CLIP": dtype != "fp16"}
        yield start._random_start_kernel, types, absent | draw


def by_class(dtype: str) -> Iterator[Case]:
    types = {"label_ptr": "*i64", "temperature": "fp32", "student_temperature": "fp32", "B": "i32"}
    types |= {"row_grad_stride": "i32", "stride": "i32", "student_ptr": f"*{dtype}", "logits_ptr": f"*{dtype}"}
    types |= {
        "temperature_ptr": "*fp32",
        "weight_ptr": "*fp32",
        "trust_ptr": "*fp32",
        "row_grad_ptr": "*fp32",
    }
    types |= {"teacher_ptr": f"*{dtype}" if ALIGNED[dtype] else "*bf16"}
    absent = {} if OPTIONAL[dtype] else dict.fromkeys(["temperature_ptr", "weight_ptr", "trust_ptr", "row_grad_ptr"])
    # of 100 classes, fp16 differs from bf16 in its alignment alone, which 10 and 1,000 classes cover
    for classes in (10, 100, 1000) if ALIGNED[dtype] else (10, 1000):
        tiles = rows.row_tiles(classes, gcd(classes, 16 // SIZE[dtype]))
        dense = dict.fromkeys(["STUDENT_STRIDE", "TEACHER_STRIDE", "OUT_STRIDE"], classes)
        for grad in (True, False):
            out = {"out_ptr": f"*{dtype}" if grad else "*fp32"}
            yield kl._kl_kernel, types | out, absent | tiles | dense | {"GRAD": grad}


def class_sums(dtype: str) -> Iterator[Case]:
    whole = "*i64" if ALIGNED[dtype] else "*i32"  # the result, or the parts of it
    types = {"logits_ptr": f"*{dtype}", "label_ptr": "*i64" if ALIGNED[dtype] else "*u8", "hit_ptr": "*i8"}
    types |= {"part_correct_ptr": "*i32", "part_count_ptr": "*i32", "correct_ptr": whole, "count_ptr": whole}
    types |= dict.fromkeys(["loss_ptr", "part_loss_ptr", "cross_entropy_ptr"], "*fp32") | {"B": "i32", "parts": "i32"}
    for classes in (10, sums.WIDEST, 100, 1000):
        tiles = rows.row_tiles(classes, gcd(classes, 16 // SIZE[dtype])) | {"STRIDE": classes}
        if classes <= sums.WIDEST:
            yield sums._class_sums_kernel, types, tiles | {"WIDTH": next_power_of_2(classes)}
        else:
            yield sums._row_losses_kernel, types, tiles
    for classes in (10, 1000):
        yield sums._total_kernel, types, sums.sum_tiles(classes)
    yield sums._slice_sums_kernel, types, sums.sum_tiles(1000) | {"SLICE": sums.SLICE}


def jensen_shannon(dtype: str) -> Iterator[Case]:
    aligned, logits = ALIGNED[dtype], {"student_ptr": f"*{dtype}", "teacher_ptr": f"*{dtype}"}
    types = logits | {"student_grad_ptr": f"*{dtype}", "teacher_grad_ptr": f"*{dtype}", "loss_ptr": "*fp32"}
    types |= dict.fromkeys(["temperature_ptr", "weight_ptr", "row_weight_ptr", "row_grad_ptr"], "*fp32")
    types |= dict.fromkeys(["temperature", "student_temperature", "beta"], "fp32") | {"label_ptr": "*i64", "B": "i32"}
    types |= dict.fromkeys(["temperature_stride", "row_weight_stride", "row_grad_stride", "ignore_index"], "i32")
    optional = ["label_ptr", "temperature_ptr", "weight_ptr", "row_weight_ptr", "row_grad_ptr", "ignore_index"]
    absent = {} if OPTIONAL[dtype] else dict.fromkeys(optional)
    for classes in (10, 100, 1000, 100_000) if aligned else (10, 1000):
        tiles = rows.row_tiles(classes, gcd(classes, 16 // SIZE[dtype]))
        tiles |= {"STUDENT_STRIDE": classes, "TEACHER_STRIDE": classes, "BY_ROW": dtype == "fp16"}
        for left_out in (["student_grad_ptr", "teacher_grad_ptr"], ["loss_ptr"], ["loss_ptr", "teacher_grad_ptr"]):
            # without a gradient it is the loss that is written, a number for each row
            yield js._js_kernel, types, absent | tiles | dict.fromkeys(left_out) | {"GRAD": left_out[0] == "loss_ptr"}


def augmentation(dtype: str) -> Iterator[Case]:
    types = {"image_ptr": "*u8", "view_ptr": "*i64", "index_ptr": "*i64", "out_ptr": f"*{dtype}", "N": "i32"}
    absent = {} if OPTIONAL[dtype] else {"index_ptr": None}
    for side, channels, reflect in ((32, 3, False), (28, 1, False), (32, 3, True)):
        shape = {"HEIGHT": side, "WIDTH": side, "CHANNELS": channels, "PADDING": 4, "REFLECT": reflect}
        yield views._augment_kernel, types, absent | shape | views.view_tile(side, side * channels)


def convolution(dtype: str) -> Iterator[Case]:
    images = ["x_ptr", "residual_ptr", "y_ptr", "grad_ptr", "x_grad_ptr", "residual_grad_ptr"]
    types = dict.fromkeys(images, f"*{dtype}") | {"scale_ptr": "*fp32", "shift_ptr": "*fp32"}
    types |= dict.fromkeys(["words", "plane", "channels"], "i32")
    absent = {} if OPTIONAL[dtype] else dict.fromkeys(["scale_ptr", "residual_ptr", "residual_grad_ptr"])
    word = 16 // SIZE[dtype] if ALIGNED[dtype] else 1
    for layout in ({"SPAN": word, "plane": 1}, {"SPAN": 1}):  # channels-last; contiguous
        sizes = {"WORD": word, "WORDS": after.WORDS, "INDEX": tl.int32, **layout}
        yield after._epilogue_kernel, types, absent | sizes | {"RELU": dtype != "fp16"}
        yield after._epilogue_grad_kernel, types, absent | sizes


def compile_case(case: Case, target: GPUTarget, aligned: bool) -> Any:
    kernel, types, constants = case
    options = {"num_warps": constants.get("num_warps", 4), **EXACT}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    divisible = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if aligned and (signature[name].startswith("*") or name == "pixels")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    return triton.compile(source, target=target, options=options)


def usage(compiled: Any, target: GPUTarget) -> dict[str, int]:
    """Return the registers, and bytes or registers spilled, as the vendor's own tools report them."""
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


def accesses(compiled: Any) -> dict[str, dict[str, int]]:
    """Return the widths in bits of the loads and the stores of global memory, and how many there are of each."""
    found = re.findall(r"\b(ld|st)\.global[.\w:]*?(?:\.v(\d))?\.[bfsu](\d+)\s", compiled.asm.get("ptx", ""))
    counts = Counter((kind, int(number or 1) * int(bits)) for kind, number, bits in found)
    return {kind: {str(bits): n for (of, bits), n in sorted(counts.items()) if of == kind} for kind in ("ld", "st")}


def row(constants: dict[str, Any]) -> int:
    """Return the number of values that lie side by side; one access may take a divisor of it."""
    return constants.get("K") or constants.get("WIDTH", 16) * constants.get("CHANNELS", 1)


def report(folder: str, name: str) -> None:
    """Compile all for the target `name`, and write the reports."""
    backend, arch, warp_size = name.split(":")
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp_size))
    with open(Path(folder) / arch, "w") as file:
        for dtype, aligned in ALIGNED.items():
            for case in (
                *elementwise(dtype),
                *by_class(dtype),
                *class_sums(dtype),
                *jensen_shannon(dtype),
                *augmentation(dtype),
                *convolution(dtype),
            ):
                compiled = compile_case(case, target, aligned)
                what = {"kernel": case[0].__name__, "dtype": dtype, "aligned": aligned, "row": row(case[2])}
                what["writes_rows"] = case[2].get("GRAD") is False  # one number for each
                print(json.dumps(what | {"usage": usage(compiled, target), **accesses(compiled)}), file=file)


def main(folder: str, *names: str) -> None:
    with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
        list(pool.map(report, [folder] * len(names), names))


if __name__ == "__main__":
    main(*sys.argv[1:])
