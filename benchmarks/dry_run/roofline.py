"""What a step would take on one H200 if nothing but arithmetic, memory and launches took time: a model, no measurement.

A convolution is a matrix product cut into tiles for 132 multiprocessors, by the best of the usual tile sizes; a wave
that is not full costs a whole one. Anything else moves its bytes. Each takes no less than a kernel that does nothing,
and between two nodes of a graph there is a gap. The rates in `MACHINE` are assumed, in round numbers below what NVIDIA
states of the H200; the first run on one is to mend them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from dry_run.convolution import Convolution, read
from dry_run.trace import Op


@dataclass(frozen=True)
class Machine:
    """Rates of a GPU.

    Attributes:
        flops: matrix products in bf16, a second, of the whole device; of float32 in TF32 half of it.
        bandwidth, cache_bandwidth: bytes a second, of the memory and of the cache.
        cached: bytes of an operator's tensors up to which they lie in the cache.
        gap_s: between two nodes of a graph.
        least_s: a kernel that does next to nothing.
        edge_s: a tile's way in and out.
        tiles: the share of `flops` that a tile of so many rows and columns reaches.
        depthwise: the share of the bandwidth that cuDNN's depthwise convolutions reach.
    """

    multiprocessors: int
    flops: float
    bandwidth: float
    cache_bandwidth: float
    cached: float
    gap_s: float
    least_s: float
    edge_s: float
    depthwise: float
    tiles: tuple[tuple[int, int, float], ...]

    def slower(self, factor: float) -> "Machine":
        """Return a machine whose tiles reach `factor` of what they reach here."""
        return replace(self, tiles=tuple((rows, columns, share * factor) for rows, columns, share in self.tiles))


MACHINE = Machine(
    multiprocessors=132,
    flops=790e12,
    bandwidth=4.3e12,
    cache_bandwidth=5.5e12,
    cached=30e6,
    gap_s=0.8e-6,
    least_s=1.6e-6,
    edge_s=2.5e-6,
    depthwise=0.5,
    tiles=(
        (64, 64, 0.40),
        (128, 64, 0.60),
        (256, 64, 0.62),
        (64, 128, 0.58),
        (128, 128, 0.76),
        (256, 128, 0.84),
        (128, 256, 0.84),
        (128, 192, 0.80),
    ),
)
SPLITS = (1, 2, 4)  # of a product's inner dimension, where that is long and the device not full
LONG = 1024
TINY = "FillFunctor", "for_multi_outputs"  # kernels that fill a counter, or take a value for each channel


def seconds(ops: Iterable[Op], machine: Machine = MACHINE) -> dict[str, float]:
    """Return the modelled time of each phase."""
    times: dict[str, float] = {}
    for op in ops:
        times[op.phase] = times.get(op.phase, 0.0) + of_op(op, machine)
    return times


def of_op(op: Op, machine: Machine) -> float:
    """Return the modelled time of an operator, with the gaps between its launches.

    What is no convolution shares the operator's bytes, but for kernels of a few numbers.
    """
    plans = [read(name) for kind, name in op.launches if kind == "convolution"]
    others = [name for kind, name in op.launches if kind != "convolution"]
    sharing = [name for name in others if not any(sign in name for sign in TINY)] or others
    left = max(0, op.bytes - sum(plan.bytes for plan in plans))
    time = sum(of_convolution(plan, machine) for plan in plans)
    for name in others:
        own = left / len(sharing) if name in sharing else 0
        time += max(machine.least_s, moving(own, machine) + 1e-6)
    return time + machine.gap_s * len(op.launches)


def moving(size: float, machine: Machine) -> float:
    """Return how long it takes to move so many bytes."""
    return size / (machine.cache_bandwidth if size < machine.cached else machine.bandwidth)


@lru_cache(maxsize=4096)
def of_convolution(plan: Convolution, machine: Machine) -> float:
    """Return the modelled time of a convolution, without the gap after it."""
    if plan.groups > 1:
        return plan.bytes / (machine.bandwidth * machine.depthwise) + 1e-6
    m, n, k = plan.as_product()
    rate = machine.flops / machine.multiprocessors / (2 if plan.item > 2 else 1)
    splits = (
        SPLITS
        if plan.kind != "weight_gradient"
        else (max(1, machine.multiprocessors // (ceil(m / 128) * ceil(n / 128))),)
    )
    product = min(
        of_tiles(m, n, k, tile, split, rate, machine)
        for tile in machine.tiles
        for split in splits
        if split == 1 or plan.kind == "weight_gradient" or worth_splitting(m, n, k, tile, split, machine)
    )
    return max(product, moving(plan.bytes, machine) + 1e-6)


def worth_splitting(m: int, n: int, k: int, tile: tuple[int, int, float], split: int, machine: Machine) -> bool:
    return k / split >= LONG and ceil(m / tile[0]) * ceil(n / tile[1]) < machine.multiprocessors


def of_tiles(m: int, n: int, k: int, tile: tuple[int, int, float], split: int, rate: float, machine: Machine) -> float:
    """Return the time of a product in tiles of one size, its inner dimension split; splits are added up at the end."""
    rows, columns, share = tile
    waves = ceil(ceil(m / rows) * ceil(n / columns) * split / machine.multiprocessors)
    time = waves * 2 * rows * columns * k / split / (rate * share) + machine.edge_s
    return time if split == 1 else time + 1.5e-6 + 8 * m * n * split / machine.cache_bandwidth
