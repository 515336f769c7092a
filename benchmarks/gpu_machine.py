"""The rates of a GPU that bound the step: memory, matrix units, launches, graphs, and the step's convolutions.

    python benchmarks/gpu_machine.py rates --json FILE            a minute at most
    python benchmarks/gpu_machine.py convolutions --json FILE     one by one, as the step has them

`rates`: GB/s of a large copy and TFLOP/s of a large matrix product (`Rates`); microseconds of a launch that Python
makes and of a launch of a graph of one kernel; of a kernel in a graph of many, one after another, and in two branches
beside one another; and of an empty kernel itself where the profiler tells it. The gap between two nodes is the
difference.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.bench.case import Request
from retemper.bench.machine import Rates, count_launches, wait
from retemper.bench.result import header, save
from retemper.bench.step_phases import in_a_graph
from retemper.engine.speed.beside import Branch

NODES, CALLS, ROUNDS = 500, 20, 5
SHAPES = (  # input channels, output channels, pixels a side, stride, groups: of ResNet-18, WRN-34-10, MobileNetV2
    *((64, 64, 32, 1, 1), (64, 128, 32, 2, 1), (128, 128, 16, 1, 1), (256, 256, 8, 1, 1), (512, 512, 4, 1, 1)),
    *((3, 64, 32, 1, 1), (8, 64, 32, 1, 1)),
    *((160, 160, 32, 1, 1), (320, 320, 16, 1, 1), (640, 640, 8, 1, 1)),
    *((96, 96, 32, 1, 96), (192, 192, 16, 1, 192), (384, 384, 8, 1, 384)),
)
Work = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rates", "convolutions"))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=128)
    words = parser.parse_args()
    checked = not os.environ.get("RETEMPER_REHEARSAL")
    request = Request(what=f"machine {words.what}", device=torch.device("cuda"), checked=checked)
    result: dict[str, Any] = header(request) | {"command": f"python benchmarks/gpu_machine.py {words.what}"}
    for name, value in rates(request.device) if words.what == "rates" else convolutions(words.batch):
        result["rates"][name] = value
        save(words.json, result)
        print(f"{name:56} {json.dumps(value)}", flush=True)
    save(words.json, result | {"complete": True})


def rates(device: torch.device) -> Iterator[tuple[str, Any]]:
    """Yield each rate by name, with its unit."""
    found = Rates(device)
    yield "copy, GB/s", round(found.copy_gb_per_s())
    for precision in ("bf16", "tf32", "fp32"):
        yield f"matrix product in {precision}, TFLOP/s", round(found.matmul_tflop_per_s(precision), 1)
    x, y = torch.zeros(2, 1, device=device)
    branch = Branch(device, apart=True)

    def many() -> None:
        for _ in range(NODES):
            x.add_(1)

    def beside() -> None:
        branch.run(lambda: [y.add_(1) for _ in range(NODES // 2)][-1])
        for _ in range(NODES // 2):
            x.add_(1)
        branch.join()

    yield "a launch from Python, us", round(1e3 * milliseconds(many) / NODES, 3)
    yield "a launch of a graph of one kernel, us", round(1e3 * milliseconds(in_a_graph(lambda: x.add_(1)), NODES), 3)
    replay = in_a_graph(many)
    yield "a kernel in a graph, one after another, us", round(1e3 * milliseconds(replay) / NODES, 3)
    yield "a kernel in a graph of two branches, us", round(1e3 * milliseconds(in_a_graph(beside)) / NODES, 3)
    busy_ms = count_launches(replay, device)["kernel_ms"]
    yield "an empty kernel itself, us", busy_ms and round(1e3 * busy_ms / NODES, 3)


def convolutions(batch: int) -> Iterator[tuple[str, Any]]:
    """Yield microseconds and TFLOP/s of the step's convolutions in bf16 and channels-last, CALLS in a graph."""
    for shape in SHAPES:
        for kind, call, flop in _calls(batch, *shape):
            name = "{} -> {}, {} px, stride {}, groups {}".format(*shape)
            try:
                replay = in_a_graph(partial(_repeated, call))
                us = 1e3 * milliseconds(replay, 3) / CALLS
            except RuntimeError as error:  # cuDNN has no such plan: the others are worth knowing all the same
                yield f"{name}: {kind}", f"fails: {str(error).splitlines()[0][:100]}"
                continue
            yield f"{name}: {kind}", [round(us, 2), round(flop / us / 1e6, 1)]


def _repeated(call: Work) -> None:
    for _ in range(CALLS):
        call()


def _calls(
    batch: int, inputs: int, outputs: int, side: int, stride: int, groups: int
) -> Iterator[tuple[str, Work, float]]:
    """Yield what is done with one shape, a call of it and its operations."""

    def random(*shape: int) -> Tensor:
        made = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        return made.to(memory_format=torch.channels_last) if len(shape) == 4 else made

    x, w, b = random(batch, inputs, side, side), random(outputs, inputs // groups, 3, 3), random(outputs)
    y = F.conv2d(x, w, None, stride, 1, 1, groups)
    flop = 2 * y.numel() * 9 * inputs // groups
    two, ones = [stride, stride], [1, 1]

    def backward(data: bool) -> Work:
        wanted = [data, not data, False]
        return lambda: torch.ops.aten.convolution_backward(
            y, x, w, None, two, ones, ones, False, [0, 0], groups, wanted
        )

    yield "forward", lambda: F.conv2d(x, w, None, stride, 1, 1, groups), flop
    yield "gradient of the data", backward(True), flop
    yield "gradient of the weight", backward(False), flop
    if groups == 1:
        yield "forward, shift, ReLU", lambda: torch.cudnn_convolution_relu(x, w, b, two, ones, ones, groups), flop
    if x.shape == y.shape and groups == 1:
        added = lambda: torch.cudnn_convolution_add_relu(x, w, x, 1.0, b, two, ones, ones, groups)  # noqa: E731
        yield "forward, shift, residual, ReLU", added, flop


def milliseconds(work: Work, calls: int = 1) -> float:
    """Return the milliseconds of one call: the median of ROUNDS rounds of so many."""
    taken = []
    for _ in range(ROUNDS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        wait(torch.device("cuda"))
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        wait(torch.device("cuda"))
        taken.append(begin.elapsed_time(end) / calls)
    return sorted(taken[1:])[ROUNDS // 2]


if __name__ == "__main__":
    main()
