"""Compile every kernel for some architectures, as the ops launch them; write what each takes and spills.

Run by test_compiles.py in a process of its own, since the one with the tests may be interpreting; each architecture has
a fork of it, and in the folder a file of its name with a JSON a line:
    python compile_all.py FOLDER cuda:90:32 hip:gfx942:64

A kernel's cases take turns between sm_80 and sm_100, where one compiler makes what it makes for sm_90; the other
architectures have all of them.
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

TURNS = {"80": 0, "100": 1}  # which of every two cases of a kernel an architecture has

OF_CLASS = ["temperature_ptr", "weight_ptr", "trust_ptr"]

kl = import_module("retemper.kernels.kl_kernel")
rows = import_module("retemper.kernels.logit_rows")
sums = import_module("retemper.kernels.class_sums_kernels")
js = import_module("retemper.kernels.js_kernel")
pairs = import_module("retemper.kernels.class_pair_kernels")
pgd = import_module("retemper.kernels.ascent_kernels")
noise = import_module("retemper.kernels.noise_kernels")
views = import_module("retemper.kernels.augment")
strong = import_module("retemper.kernels.strong_augment")
after = import_module("retemper.kernels.epilogue_kernels")
depth = import_module("retemper.kernels.depthwise")
norms = import_module("retemper.kernels.batch_norm_kernels")
folds = import_module("retemper.kernels.fold_weights")
guards = import_module("retemper.kernels.guard")
moved = import_module("retemper.kernels.moved_weights")

Case = tuple[Any, dict[str, str], dict[str, Any]]  # a kernel; the types of its arguments; its constants


def steps(dtype: str) -> Iterator[Case]:
    types = dict.fromkeys(["adv_ptr", "grad_ptr", "clean_ptr", "momentum_ptr", "previous_ptr"], f"*{dtype}")
    types |= {"mask_ptr": "*i1", "pixels": "i32", "blocks": "i32"}
    types |= dict.fromkeys(["step", "eps", "lower", "upper", "decay", "inertia", "rest"], "fp32")
    names = ("STEP_BY", "EPS_BY", "LOWER_BY", "UPPER_BY")
    plain = dict.fromkeys(["mask_ptr", "previous_ptr", "inertia", "rest", "CHANNELS", "GRAD", "CLEAN", "MASK"])
    plain |= {"BLOCK": pgd.BLOCK, "PIXELS": 3 * 32 * 32, "CLIP_FIRST": False, **dict.fromkeys(names, "none")}
    by_sample = {"STEP_BY": "sample", "EPS_BY": "sample"} if OPTIONAL[dtype] else {}
    usual = types | (dict.fromkeys(["step", "eps"], "*fp32") if by_sample else {})
    yield pgd._linf_kernel, usual, plain | by_sample | ({} if by_sample else {"blocks": None})
    yield pgd._l2_kernel, usual, plain | by_sample
    yield pgd._l2_kernel, usual, plain | by_sample | {"CLIP_FIRST": True}
    yield pgd._momentum_kernel, types, plain

    # All at once: numbers by channel, a mask, and tensors of another dtype and in other layouts.
    all_numbers = dict.fromkeys(["step", "eps", "lower", "upper"], "*fp32")
    types |= all_numbers | {"grad_ptr": "*fp32", "clean_ptr": "*bf16", "momentum_ptr": "*fp32"}
    strides = ((3, 32, 32), (3072, 1, 96, 3))
    here = {
        "BLOCK": pgd.STRIDED_BLOCK,
        "PIXELS": 3 * 32 * 32,
        "CLIP_FIRST": False,
        "CHANNELS": (3, 1024),
        "other_layout": True,
    }
    here |= {"GRAD": strides, "CLEAN": strides, "MASK": ((3, 32, 32), (1, 0, 0, 0))}
    bounds = {"LOWER_BY": "channel", "UPPER_BY": "one"}
    yield pgd._linf_kernel, types, here | bounds | {"STEP_BY": "both", "EPS_BY": "channel"}
    yield pgd._l2_kernel, types, here | bounds | {"STEP_BY": "one", "EPS_BY": "sample"}
    alone = {"STEP_BY": "none", "EPS_BY": "sample", "grad_ptr": None, "CLIP_FIRST": True}  # a projection
    yield pgd._l2_kernel, types | {"step": "fp32"}, here | bounds | alone
    yield pgd._momentum_kernel, types, here


def starts(dtype: str) -> Iterator[Case]:
    types = dict.fromkeys(["eps", "scale", "lower", "upper"], "fp32") | dict.fromkeys(["blocks", "first_row"], "i32")
    types |= {
        "adv_ptr": f"*{dtype}",
        "clean_ptr": f"*{dtype}",
        "seed_ptr": "*i64",
        "pixels": "i32",
        "rows_apart": "i32",
    }
    by = {"CHANNELS": None, "EPS": "none", "LOWER": "none", "UPPER": "none"}
    if dtype == "bf16":
        types["eps"], by["EPS"] = "*fp32", "sample"
    elif dtype == "fp16":  # numbers by channel are loaded one by one, whatever is aligned
        types |= {"eps": "*fp32", "lower": "*fp32", "upper": "*fp32", "clean_ptr": "*fp32"}
        by = {"CHANNELS": (3, 1024), "EPS": "one", "LOWER": "channel", "UPPER": "one"}
    by["CLIP"] = dtype != "fp32"
    absent = {} if OPTIONAL[dtype] else {"blocks": None}
    yield noise._uniform_start_kernel, types, absent | by | {"BLOCK": noise.BLOCK}
    yield noise._normal_start_kernel, types, by | {"BLOCK": noise.BLOCK // 2, "num_warps": noise.NORMAL_WARPS}
    for spare in (2, 0):
        of_image = {"PIXELS": 3 * 32 * 32, "NUMBERS": 3 * 32 * 32 + spare, "HALF": noise.halves(3 * 32 * 32 + spare)}
        yield noise._ball_start_kernel, types, by | of_image | {"BLOCK": noise.BLOCK}


def by_class(dtype: str) -> Iterator[Case]:
    """Yield what recipes launch, with and without all that is by class; and once each what else may be asked for."""
    types = {"label_ptr": "*i64", "temperature": "fp32", "student_temperature": "fp32", "B": "i32"}
    types |= dict.fromkeys(["temperature_stride", "row_weight_stride", "row_grad_stride", "ignore_index"], "i32")
    types |= {"trust_stride": "i32"} | dict.fromkeys(["p_ptr", "q_ptr", "p_grad_ptr", "q_grad_ptr"], f"*{dtype}")
    types |= dict.fromkeys(["temperature_ptr", "weight_ptr", "trust_ptr", "row_weight_ptr", "row_grad_ptr"], "*fp32")
    types |= {"loss_ptr": "*fp32", "p_ptr": f"*{dtype}" if ALIGNED[dtype] else "*bf16"}
    rare = dict.fromkeys(["row_weight_ptr", "ignore_index", "p_grad_ptr"])
    absent = rare if OPTIONAL[dtype] else rare | dict.fromkeys(OF_CLASS) | {"row_grad_ptr": None}
    flags = dict.fromkeys(["BY_ROW", "REVERSE", "GIVEN", "TRUST_BY_ROW"], False)
    # of 100 classes, fp16 differs from bf16 in its alignment alone, which 10 and 1,000 classes cover
    for classes in (10, 100, 1000) if ALIGNED[dtype] else (10, 1000):
        tiles = rows.row_tiles(classes, gcd(classes, 16 // SIZE[dtype]))
        strides = dict.fromkeys(["P_STRIDE", "Q_STRIDE", "P_GRAD_STRIDE", "Q_GRAD_STRIDE"], classes)
        for out in ({"loss_ptr": None}, {"q_grad_ptr": None}):
            yield kl._kl_kernel, types, absent | flags | tiles | strides | out
        if dtype == "fp32":
            yield from rarely(types, flags | tiles | strides)


def rarely(types: dict[str, str], constants: dict[str, Any]) -> Iterator[Case]:
    """Yield what else the KL may be asked for: both gradients, reversed, of probabilities, by row, rows left out."""
    both, loss = {"loss_ptr": None}, dict.fromkeys(["p_grad_ptr", "q_grad_ptr"])
    unlabelled = dict.fromkeys([*OF_CLASS, "label_ptr", "ignore_index"])
    for out in (both, loss):
        yield kl._kl_kernel, types, constants | out  # all at once
        yield kl._kl_kernel, types, constants | out | {**dict.fromkeys(OF_CLASS[1:]), "BY_ROW": True, "REVERSE": True}
        yield kl._kl_kernel, types, constants | out | {"TRUST_BY_ROW": True, "BY_ROW": True, "weight_ptr": None}
        yield kl._kl_kernel, types, constants | out | unlabelled | {"GIVEN": True}


def class_sums(dtype: str) -> Iterator[Case]:
    types = {"logits_ptr": f"*{dtype}", "label_ptr": "*i64" if ALIGNED[dtype] else "*u8", "hit_ptr": "*i8"}
    types |= dict.fromkeys(["part_correct_ptr", "part_count_ptr", "correct_ptr", "count_ptr"], "*i64")
    types |= dict.fromkeys(["loss_ptr", "part_loss_ptr", "cross_entropy_ptr"], "*fp32") | {"B": "i32", "parts": "i32"}
    add = {"ADD": OPTIONAL[dtype] is not None}
    for classes in (10, sums.WIDEST, 100, 1000):
        tiles = rows.row_tiles(classes, gcd(classes, 16 // SIZE[dtype])) | {"STRIDE": classes}
        if classes <= sums.WIDEST:
            yield sums._class_sums_kernel, types, tiles | {"WIDTH": next_power_of_2(classes), **add}
        else:
            yield sums._row_losses_kernel, types, tiles
    for classes in (10, 1000):
        yield sums._total_kernel, types, sums.sum_tiles(classes) | add
    yield sums._slice_sums_kernel, types, sums.sum_tiles(1000) | {"SLICE": sums.SLICE, **add}


def jensen_shannon(dtype: str) -> Iterator[Case]:
    aligned, logits = ALIGNED[dtype], {"student_ptr": f"*{dtype}", "teacher_ptr": f"*{dtype}"}
    types = logits | {"student_grad_ptr": f"*{dtype}", "teacher_grad_ptr": f"*{dtype}", "loss_ptr": "*fp32"}
    types |= dict.fromkeys(["temperature_ptr", "weight_ptr", "row_weight_ptr", "row_grad_ptr"], "*fp32")
    types |= dict.fromkeys(["temperature", "student_temperature", "beta"], "fp32") | {"label_ptr": "*i64", "B": "i32"}
    types |= dict.fromkeys(["temperature_stride", "row_weight_stride", "row_grad_stride", "ignore_index"], "i32")
    optional = ["label_ptr", "temperature_ptr", "weight_ptr", "row_weight_ptr", "row_grad_ptr", "ignore_index"]
    absent = {} if OPTIONAL[dtype] else dict.fromkeys(optional)
    for classes in (10, 100, 1000) if aligned else (10, 1000):
        tiles = rows.row_tiles(classes, gcd(classes, 16 // SIZE[dtype]))
        tiles |= {"STUDENT_STRIDE": classes, "TEACHER_STRIDE": classes, "BY_ROW": dtype == "fp16"}
        for left_out in (["student_grad_ptr", "teacher_grad_ptr"], ["loss_ptr"], ["loss_ptr", "teacher_grad_ptr"]):
            yield js._js_kernel, types, absent | tiles | dict.fromkeys(left_out)


def class_pairs(dtype: str) -> Iterator[Case]:
    """Yield what recipes launch, a table of float32 whatever the logits are; and weights of each row, unlabelled."""
    types = dict.fromkeys(["clean_ptr", "adv_ptr", "clean_grad_ptr", "adv_grad_ptr"], f"*{dtype}")
    types |= dict.fromkeys(["weight_ptr", "row_grad_ptr", "loss_ptr"], "*fp32") | {"label_ptr": "*i64"}
    types |= dict.fromkeys(["row_grad_stride", "ignore_index", "B"], "i32")
    absent = {} if OPTIONAL[dtype] else dict.fromkeys(["label_ptr", "ignore_index"])
    for classes in (10, 100, 1000) if ALIGNED[dtype] else (10, 1000):
        tiles = rows.row_tiles(classes, gcd(classes, 16 // SIZE[dtype]))
        tiles |= dict.fromkeys(["CLEAN_STRIDE", "ADV_STRIDE", "WEIGHT_STRIDE"], classes)
        for left_out in (
            ["clean_grad_ptr", "adv_grad_ptr", "row_grad_ptr"],
            ["loss_ptr"],
            ["loss_ptr", "clean_grad_ptr"],
        ):
            yield pairs._pair_kernel, types, absent | tiles | dict.fromkeys(left_out)


def augmentation(dtype: str) -> Iterator[Case]:
    types = {"image_ptr": "*u8", "view_ptr": "*i64", "index_ptr": "*i64", "out_ptr": f"*{dtype}", "N": "i32"}
    absent = {} if OPTIONAL[dtype] else {"index_ptr": None}
    for side, channels, reflect in ((32, 3, False), (28, 1, False), (32, 3, True)):
        shape: dict[str, Any] = {"HEIGHT": side, "WIDTH": side, "CHANNELS": channels, "PADDING": 4}
        shape["MODE"] = "reflect" if reflect else "zeros"
        yield views._augment_kernel, types, absent | shape | views.view_tile(side, side * channels)


def strong_augmentation(dtype: str) -> Iterator[Case]:
    """Yield what recipes launch: IDBH of colour images and of grey ones, and a reflected crop with cutout."""
    types = {"image_ptr": "*u8", "view_ptr": "*i64", "index_ptr": "*i64", "out_ptr": f"*{dtype}", "N": "i32"}
    absent = {} if OPTIONAL[dtype] else {"index_ptr": None}
    policies = {"fp32": ("idbh-strong", "crop"), "fp16": ("idbh-svhn",), "bf16": ("idbh-weak", "cropshift")}
    for policy in policies[dtype]:
        side, channels = (28, 1) if policy == "idbh-svhn" else (32, 3)
        form = {"POLICY": policy, "MIRROR": True, "PADDING": 4, "MODE": "reflect", "SQUARE": 8 * (policy == "crop")}
        sizes = strong.strong_constants((1, side, side, channels), policy)
        sizes.pop("N")
        yield strong._strong_augment_kernel, types, absent | form | sizes


def convolution(dtype: str) -> Iterator[Case]:
    images = ["x_ptr", "residual_ptr", "y_ptr", "grad_ptr", "x_grad_ptr", "residual_grad_ptr"]
    images += (sums := ["sum_ptr", "second_ptr", "sum_grad_ptr"])
    types = dict.fromkeys(images, f"*{dtype}") | {"scale_ptr": "*fp32", "shift_ptr": "*fp32"}
    types |= dict.fromkeys(["words", "plane", "channels"], "i32")
    absent = {} if OPTIONAL[dtype] else dict.fromkeys(["scale_ptr", "residual_ptr", "residual_grad_ptr"])
    word = 16 // SIZE[dtype] if ALIGNED[dtype] else 1
    for layout in ({"SPAN": word, "plane": 1}, {"SPAN": 1}):  # channels-last; contiguous
        sizes = {"WORD": word, "WORDS": after.WORDS, "INDEX": tl.int32, **layout}
        usual = absent | sizes | dict.fromkeys([*sums, "PIXELS"])
        yield after.epilogue_kernel, types, usual | {"RELU": dtype != "fp16"}
        yield after.epilogue_grad_kernel, types, usual
        yield after.epilogue_kernel, types, sizes | {"RELU": True}
        yield after.epilogue_grad_kernel, types, sizes | {"PIXELS": None}
        yield after.epilogue_grad_kernel, types, usual | {"PIXELS": 16, "residual_grad_ptr": None}


def depthwise(dtype: str) -> Iterator[Case]:
    types = dict.fromkeys(["x_ptr", "y_ptr", "weight_ptr", "grad_ptr", "x_grad_ptr"], f"*{dtype}")
    types |= {"shift_ptr": "*fp32"} | dict.fromkeys(["pixels", "height", "width", "y_height", "y_width"], "i32")
    for stride, channels in ((1, 384), (2, 144)) if ALIGNED[dtype] else ((2, 24),):
        sizes = depth.tile(channels) | {"SIZE": 3, "STRIDE": stride, "PADDING": 1, "INDEX": tl.int32}
        yield depth._depthwise_kernel, types | {"channels": "i32"}, sizes | {"RELU": True}
        yield depth._depthwise_grad_kernel, types | {"channels": "i32"}, sizes


def batch_norm(dtype: str) -> Iterator[Case]:
    """Yield what a network launches: with a shortcut and a ReLU, or without either; of 64 channels or of 3."""
    images = ["x_ptr", "residual_ptr", "y_ptr", "grad_ptr", "other_ptr", "x_grad_ptr", "passed_ptr"]
    types = dict.fromkeys(images, f"*{dtype}") | dict.fromkeys(["rows", "words", "slice"], "i32")
    types |= dict.fromkeys(["weight_ptr", "bias_ptr", "mean_ptr", "rstd_ptr"], "*fp32")
    types |= dict.fromkeys(["running_mean_ptr", "running_var_ptr", "weight_grad_ptr", "bias_grad_ptr"], "*fp32")
    parts = ["part_mean_ptr", "part_square_ptr", "part_bias_ptr", "part_weight_ptr"]
    types |= dict.fromkeys(parts, "*fp32") | {"batches_ptr": "*i64", "momentum": "fp32", "eps": "fp32"}
    full = OPTIONAL[dtype] is not None
    absent = {} if full else dict.fromkeys(["residual_ptr", "other_ptr", "y_ptr", "passed_ptr", "running_mean_ptr"])
    sizes = norms.norm_tile(*((64, 16 // SIZE[dtype]) if ALIGNED[dtype] else (3, 1)), SIZE[dtype])
    sums = {"GROUPS": 2, "PARTS": norms.PARTS, "MOVES": (0, 1), "MOVED": 2, "RELU": full}
    yield norms._moments_kernel, types, sizes
    yield norms._batch_norm_kernel, types, {name: to for name, to in absent.items() if name != "y_ptr"} | sizes | sums
    yield norms._batch_norm_sums_kernel, types, absent | sizes
    yield norms._batch_norm_grad_kernel, types, absent | sizes | sums


def folding(dtype: str) -> Iterator[Case]:
    types = {"table_ptr": "*i64", **dict.fromkeys(["gamma_ptr", "mean_ptr", "eps_ptr", "scale_ptr"], "*fp32")}
    types |= {"shift_ptr": "*fp32", "source_ptr": "*fp32", "to_ptr": f"*{dtype}"}
    yield folds._fold_norms_kernel, types, {"CHANNELS": folds.CHANNELS}
    yield folds._scale_rows_kernel, types, {"ROWS": folds.ROWS, "COLS": folds.COLS}


def guarding(dtype: str) -> Iterator[Case]:
    names = ["loss_ptr", "loss_at_ptr", "found_ptr", "poison_ptr", "total_ptr"]
    types = {**dict.fromkeys(names, "*fp32"), **dict.fromkeys(["next_seed_ptr", "seed_ptr"], "*i64")}
    types |= {"norms_ptr": "*fp32", "norms": "i32", "rows": "i32"}
    absent = {"norms_ptr": None} if dtype == "fp32" else {}
    yield guards._guard_kernel, types, {"BLOCK": guards.BLOCK, "num_warps": 1, **absent}


def moving(dtype: str) -> Iterator[Case]:
    weights = ["average_ptr", "weight_ptr", "gradient_ptr", "kept_ptr"]
    numbers = ["active_ptr", "count_ptr", "weight_norm_ptr", "gradient_norm_ptr", "gamma_ptr"]
    types = {"table_ptr": "*i64", **dict.fromkeys(weights, f"*{dtype}"), **dict.fromkeys(numbers, "*fp32")}
    absent = {} if OPTIONAL[dtype] else {"rate": None}
    for warm_up in (False, True):
        yield moved._follow_kernel, types | {"rate": "fp32"}, {"WARM_UP": warm_up, "CHUNK": moved.CHUNK, **absent}
    yield moved._perturb_kernel, types, {"CHUNK": moved.CHUNK}


def compile_case(case: Case, target: GPUTarget, aligned: bool) -> Any:
    kernel, types, constants = case
    rounding = depth.FUSED if kernel in (depth._depthwise_kernel, depth._depthwise_grad_kernel) else EXACT
    options = {"num_warps": constants.get("num_warps", 4), **rounding}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    whole = ("pixels",) if "SPAN" in constants else ("pixels", "channels")
    divisible = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if aligned and (signature[name].startswith("*") or name in whole)
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
        report = dump("-res-usage", file.name)
        found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
        if found["STACK"]:  # bytes that some compilers set aside and never touch
            found["STACK"] *= bool(re.search(r"\b(STL|LDL)\b", dump("-sass", file.name)))
    return found


def dump(*words: str) -> str:
    """Return what NVIDIA's own tool says of a compiled file."""
    done = subprocess.run([CUOBJDUMP, *words], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def accesses(compiled: Any) -> dict[str, dict[str, int]]:
    """Return the widths in bits of the loads and the stores of global memory, and how many there are of each."""
    found = re.findall(r"\b(ld|st)\.global[.\w:]*?(?:\.v(\d))?\.[bfsu](\d+)\s", compiled.asm.get("ptx", ""))
    counts = Counter((kind, int(number or 1) * int(bits)) for kind, number, bits in found)
    return {kind: {str(bits): n for (of, bits), n in sorted(counts.items()) if of == kind} for kind in ("ld", "st")}


def row(constants: dict[str, Any]) -> int:
    """Return the number of values that lie side by side; one access may take a divisor of it."""
    if "HEIGHT" in constants:  # of images
        return constants["WIDTH"] * constants["CHANNELS"]
    return constants.get("K", 16)


def report(folder: str, name: str) -> None:
    """Compile all for the target `name`, and write the reports."""
    backend, arch, warp_size = name.split(":")
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp_size))
    had: Counter[str] = Counter()
    with open(Path(folder) / arch, "w") as file:
        for dtype, aligned in ALIGNED.items():
            for case in (
                *steps(dtype),
                *starts(dtype),
                *by_class(dtype),
                *class_sums(dtype),
                *jensen_shannon(dtype),
                *class_pairs(dtype),
                *augmentation(dtype),
                *strong_augmentation(dtype),
                *convolution(dtype),
                *depthwise(dtype),
                *batch_norm(dtype),
                *folding(dtype),
                *guarding(dtype),
                *moving(dtype),
            ):
                turn = had[case[0].__name__] % 2
                had[case[0].__name__] += 1
                if turn != TURNS.get(arch, turn):
                    continue
                compiled = compile_case(case, target, aligned)
                what = {"kernel": case[0].__name__, "dtype": dtype, "aligned": aligned, "row": row(case[2])}
                what["wide"] = aligned and not case[2].get("other_layout")
                what["writes_rows"] = case[2].get("loss_ptr", 0) is not None and "loss_ptr" in case[0].arg_names
                print(json.dumps(what | {"usage": usage(compiled, target), **accesses(compiled)}), file=file)


def main(folder: str, *names: str) -> None:
    with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
        list(pool.map(report, [folder] * len(names), names))


if __name__ == "__main__":
    main(*sys.argv[1:])
