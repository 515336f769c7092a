"""The dry run of the GPU code, as far as it needs no CUDA build of PyTorch: rules, budgets, the model."""

import ctypes
import shutil
import sys
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import retemper.engine.step as engine_step

ROOT = Path(__file__).resolve().parents[2]
LINES = (  # of a dump: kind, blocks, threads, bytes, stream, where, name
    "mark\t0\t0\t0\t(nil)\t\tattack",
    "triton\t128\t128\t0\t0x1\t\t_linf_kernel",
    "memcpy\t1\t1\t400\t0x1\t\tcopy, device to pageable",
    "sync\t0\t0\t0\t(nil)\t\tcudaStreamSynchronize",
    "mark\t0\t0\t0\t(nil)\t\ttrain",
    "gemm\t1\t1\t0\t0x1\tbeside\tcublas sgemm m=1 n=2 k=3",
    "alloc\t0\t0\t512\t(nil)\tbeside\tcudaMalloc",
    "illegal\t0\t0\t0\t(nil)\t\tcudaMalloc while capturing",
)
IMAGE = torch.ones(2, 3, 4, 4)
FUSED = (
    "cudnn forward x=bf16[8,64,32,32]nhwc w=bf16[128,64,3,3]nhwc stride=2,2 in=f32 + add b=bf16[8,128,16,16]nchw"
    " + add b=bf16[1,128,1,1]nhwc + relu y=bf16[8,128,16,16]nhwc"
)


def module(name: str) -> ModuleType:
    """A module of benchmarks/dry_run, found as it is when it is run."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return import_module(f"dry_run.{name}")
    finally:
        sys.path.pop(0)


def test_records_are_read_and_told_apart() -> None:
    record = module("record")
    records = record.parsed(LINES)
    assert [one.blocks for one in records][1] == 128 and records[-1].name == "cudaMalloc while capturing"
    assert record.waits(records) == {"copy, device to pageable": 1, "cudaStreamSynchronize": 1}
    assert record.illegal(records) == {"beside cublas sgemm m=1 n=2 k=3": 1, "cudaMalloc while capturing": 1}
    assert module("step_count").launches(records) == {"attack": 2, "train": 1}


def test_a_fused_convolution_is_one_launch_with_the_bytes_of_what_lies_in_memory() -> None:
    plan = module("convolution").read(FUSED)
    assert plan.fused == ("add", "add", "relu") and (plan.stride, plan.groups) == (2, 1)
    assert plan.bytes == 2 * (8 * 64 * 32 * 32 + 128 * 64 * 9 + 2 * 8 * 128 * 16 * 16 + 128)
    assert plan.flop == 2 * (8 * 128 * 16 * 16) * (64 * 9) and plan.as_product() == (8 * 256, 128, 64 * 9)
    with pytest.raises(ValueError, match="no convolution"):
        module("convolution").read("cudnn operation7 x=bf16[1,1,1,1]nhwc")


@pytest.mark.parametrize("kind", ["input_gradient", "weight_gradient"])
def test_a_gradient_is_the_product_that_it_comes_to(kind: str) -> None:
    name = f"cudnn {kind} x=f32[8,64,32,32]nhwc w=f32[128,64,3,3]nhwc y=f32[8,128,16,16]nhwc stride=2,2 in=f32"
    plan = module("convolution").read(name)
    expected = {"input_gradient": (8 * 1024, 64, 128 * 9 // 4), "weight_gradient": (128, 64 * 9, 8 * 256)}
    assert plan.as_product() == expected[kind] and plan.item == 4


def test_a_budget_may_only_fall() -> None:
    budgets = module("budgets")
    allowed = {"settings": {"a": {"attack": 10, "train": 5}}, "host": {"epilogue": 3.0}}
    counted = {"settings": {"a": {"attack": 11, "train": 4}}, "host": {"epilogue": 1.0}}
    verdict = budgets.check(allowed, counted)
    assert verdict.above == ["settings/a/attack: 11, the budget is 10"] and not verdict.passes
    assert verdict.below == [
        "settings/a/train: 4, the budget is 5: lower it to 4",
        "host/epilogue: 1, the budget is 3: lower it to 1.3",
    ]
    assert budgets.lowered(allowed, counted) == {
        "settings": {"a": {"attack": 10, "train": 4}},
        "host": {"epilogue": 1.3},
    }


def test_what_has_no_budget_fails_and_what_was_not_counted_at_all_does_not() -> None:
    budgets = module("budgets")
    allowed = {"settings": {"a": 10}, "host": {"epilogue": 3.0}}
    assert budgets.check(allowed, {"host": {"epilogue": 2.9}}).passes
    verdict = budgets.check(allowed, {"settings": {"b": 1}})
    assert [line.split(":")[0] for line in verdict.unmatched] == ["settings/a", "settings/b"] and not verdict.passes
    assert budgets.lowered(allowed, {"settings": {"b": 1}})["settings"] == {"a": 10, "b": 1}


def test_every_budget_is_a_number_of_a_setting_that_is_counted() -> None:
    budgets, counting = module("budgets"), module("counting")
    content = budgets.load()
    assert set(content) == {"settings", "methods", budgets.HOST}
    assert set(content["settings"]) == set(counting.SETTINGS)
    assert set(content["methods"]) == set(import_module("retemper.engine.catalogue").methods())
    assert all(number >= 0 for _, number in budgets.flat(content))


def test_the_phases_are_functions_of_the_step_and_values_can_be_assumed() -> None:
    assert all(callable(getattr(engine_step, name)) for name in module("step_count").PHASES)
    attack = import_module("retemper.engine.attack")
    claim = [(torch.tensor(False), "it is not so")]
    with module("values").sound_values():
        attack.require_claims(claim)
    with pytest.raises(ValueError, match="it is not so"):
        attack.require_claims(claim)


@pytest.mark.parametrize(
    ("operator", "args", "kwargs", "expected"),
    [
        ("add.Tensor", (torch.ones(8), torch.ones(8)), {}, 3 * 32),
        ("add_.Tensor", (torch.ones(8), torch.ones(8)), {}, 3 * 32),  # read, read, written
        ("copy_.default", (torch.ones(8), torch.ones(8)), {}, 2 * 32),
        ("mul.out", (torch.ones(8), torch.ones(8)), {"out": torch.ones(8)}, 3 * 32),
        ("neg.default", (torch.ones(1).expand(8),), {}, 4 + 32),  # what is expanded is read once
        ("native_batch_norm.default", (IMAGE, None, None, None, None, True, 0.1, 1e-5), {}, 3 * 4 * IMAGE.numel() + 24),
    ],
)
def test_an_operator_moves_each_tensor_once(
    operator: str, args: Any, kwargs: Any, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = module("trace")
    monkeypatch.setattr(trace, "on_gpu", lambda value: isinstance(value, torch.Tensor))
    name, overload = operator.split(".")
    func = getattr(getattr(torch.ops.aten, name), overload)
    assert trace.bytes_moved(func, args, kwargs, func(*args, **kwargs)) == expected


def test_the_model_adds_up_by_hand() -> None:
    roofline, trace = module("roofline"), module("trace")
    machine = roofline.MACHINE
    copy = trace.Op("attack", "aten.copy_", [("kernel", "copy")], 43_000_000)
    assert roofline.seconds([copy, copy], machine)["attack"] == pytest.approx(2 * (10e-6 + 1e-6 + 0.8e-6))
    tiny = trace.Op("train", "aten.add", [("kernel", "FillFunctor"), ("kernel", "add")], 4)
    assert roofline.seconds([tiny], machine)["train"] == pytest.approx(2 * (1.6e-6 + 0.8e-6))
    name = "cudnn forward x=bf16[132,256,16,16]nhwc w=bf16[128,256,3,3]nhwc y=bf16[132,128,16,16]nhwc stride=1,1 in=f32"
    plan = module("convolution").read(name)  # one wave of 132 tiles of 256 x 128
    assert roofline.of_convolution(plan, machine) == pytest.approx(plan.flop / (0.84 * 790e12) + 2.5e-6)
    slow = roofline.of_convolution(plan, machine.slower(0.5))
    assert slow == pytest.approx(plan.flop / (0.42 * 790e12) + 2.5e-6)


def test_a_python_without_cuda_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment = module("environment")
    monkeypatch.setattr(environment.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(environment.Unavailable, match=r"has no cuda\.h: it takes a CUDA build of PyTorch"):
        environment.header_folders()


# The rules of CUDA, asked of the recorder itself. cuDNN is left out: its header comes with a CUDA build alone.
UNSUPPORTED, INVALIDATED, UNJOINED, ISOLATION, IMPLICIT, CAPTURED_EVENT = 900, 901, 904, 905, 906, 907
NOT_READY, NOT_PERMITTED = 600, 800
THREAD_LOCAL, NON_BLOCKING = 1, 1


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The recorder without cuDNN, from the headers that Triton brings."""
    found = find_spec("triton")
    places = list(found.submodule_search_locations or []) if found else []
    headers = [place for place in (Path(one) / "backends/nvidia/include" for one in places) if place.is_dir()]
    if not headers or shutil.which("g++") is None:
        pytest.skip("needs Triton's CUDA headers, and g++")
    environment = module("environment")
    sources = [one for one in environment.SOURCES.glob("*.cpp") if one.name != "dnn.cpp"]
    to = tmp_path_factory.mktemp("recorder") / "recorder.so"
    with pytest.MonkeyPatch.context() as patch:  # under another name than the driver's, which others look for
        patch.setattr(environment, "FLAGS", [flag for flag in environment.FLAGS if "soname" not in flag])
        environment.compile_library(sources, headers, to)
    return ctypes.CDLL(str(to))


class Streams:
    """Streams and events of the recorder, with calls as short as the rules that they try."""

    def __init__(self, cuda: ctypes.CDLL) -> None:
        self.cuda = cuda

    def stream(self) -> c_void_p:
        made = c_void_p()
        assert self.cuda.cudaStreamCreateWithPriority(byref(made), c_uint(NON_BLOCKING), 0) == 0
        return made

    def recorded(self, stream: c_void_p) -> c_void_p:
        event = c_void_p()
        assert self.cuda.cudaEventCreate(byref(event)) == 0
        assert self.cuda.cudaEventRecord(event, stream) == 0
        return event

    def begin(self) -> c_void_p:
        stream = self.stream()
        assert self.cuda.cudaStreamBeginCapture(stream, THREAD_LOCAL) == 0
        return stream

    def wait(self, stream: c_void_p | None, event: c_void_p) -> int:
        return self.cuda.cudaStreamWaitEvent(stream, event, c_uint(0))

    def work(self, stream: c_void_p | None) -> int:
        return self.cuda.cudaMemsetAsync(None, 0, c_size_t(4), stream)

    def end(self, stream: c_void_p) -> int:
        """End the capture; 0 if it is good, and its graph is replayed once then."""
        graph, ready = c_void_p(), c_void_p()
        if status := self.cuda.cudaStreamEndCapture(stream, byref(graph)):
            return status
        assert self.cuda.cudaGraphInstantiateWithFlags(byref(ready), graph, c_ulonglong(0)) == 0
        return self.cuda.cudaGraphLaunch(ready, stream)


@pytest.fixture
def streams(cuda: ctypes.CDLL) -> Streams:
    cuda.dry_run_reset()
    return Streams(cuda)


def dumped(cuda: ctypes.CDLL, path: Path) -> list[Any]:
    assert cuda.dry_run_dump(c_char_p(bytes(path))) == 0
    return module("record").parsed(path.read_text().splitlines())


def test_a_fork_must_be_joined(streams: Streams, tmp_path: Path) -> None:
    for joins in (True, False):
        side, origin = streams.stream(), streams.begin()
        assert streams.work(origin) == 0
        assert streams.wait(side, streams.recorded(origin)) == 0
        assert streams.work(side) == streams.work(origin) == 0
        if joins:
            assert streams.wait(origin, streams.recorded(side)) == 0
            assert streams.work(origin) == 0
        assert streams.end(origin) == (0 if joins else UNJOINED)
    graphs = [one.name for one in dumped(streams.cuda, tmp_path / "dump") if one.kind == "graph"]
    assert graphs == ["graph of 4 nodes, 3 in its longest chain"]


def test_what_is_captured_does_not_wait_for_what_is_not(streams: Streams) -> None:
    outside, origin = streams.stream(), streams.begin()
    assert streams.wait(origin, streams.recorded(outside)) == ISOLATION
    assert streams.work(origin) == streams.end(origin) == INVALIDATED


def test_what_is_captured_has_no_state_of_execution(streams: Streams) -> None:
    cuda = streams.cuda
    for ask in (cuda.cudaStreamQuery, cuda.cudaStreamSynchronize):
        origin = streams.begin()
        assert ask(origin) == UNSUPPORTED and streams.end(origin) == INVALIDATED
    origin = streams.begin()
    event = streams.recorded(origin)
    assert cuda.cudaEventQuery(event) == CAPTURED_EVENT and streams.end(origin) == INVALIDATED
    assert cuda.cudaEventSynchronize(event) == CAPTURED_EVENT  # after the capture too
    origin = streams.begin()
    assert cuda.cudaDeviceSynchronize() == UNSUPPORTED and streams.end(origin) == INVALIDATED


def test_memory_is_not_made_within_a_capture_unless_it_is_relaxed(streams: Streams) -> None:
    cuda, memory, mode = streams.cuda, c_void_p(), c_int(2)
    origin = streams.begin()
    assert cuda.cudaMalloc(byref(memory), c_size_t(64)) == UNSUPPORTED and streams.end(origin) == INVALIDATED
    origin = streams.begin()
    assert cuda.cudaThreadExchangeStreamCaptureMode(byref(mode)) == 0
    assert cuda.cudaMalloc(byref(memory), c_size_t(64)) == 0
    assert cuda.cudaThreadExchangeStreamCaptureMode(byref(mode)) == 0 and mode.value == 2
    assert streams.end(origin) == 0


def test_the_legacy_stream_waits_for_blocking_streams_alone(streams: Streams) -> None:
    origin = streams.begin()
    assert streams.work(None) == streams.end(origin) == 0
    blocking = c_void_p()
    assert streams.cuda.cudaStreamCreate(byref(blocking)) == 0
    assert streams.cuda.cudaStreamBeginCapture(blocking, THREAD_LOCAL) == 0
    assert streams.work(None) == IMPLICIT and streams.end(blocking) == INVALIDATED


def test_a_copy_to_pinned_memory_arrives_once_the_host_has_waited(streams: Streams) -> None:
    cuda, device, host = streams.cuda, c_void_p(), c_void_p()
    assert cuda.cudaMalloc(byref(device), c_size_t(4)) == cuda.cudaHostAlloc(byref(host), c_size_t(4), 0) == 0
    number = ctypes.cast(host, ctypes.POINTER(c_float))
    stream, other = streams.stream(), streams.stream()
    assert cuda.cudaMemcpyAsync(host, device, c_size_t(4), 2, stream) == 0
    assert cuda.cudaStreamSynchronize(other) == 0 and number[0] != number[0]  # NaN: another stream says nothing of it
    event = streams.recorded(stream)
    assert cuda.cudaEventQuery(event) == NOT_READY and number[0] != number[0]
    assert cuda.cudaEventQuery(event) == 0 and number[0] == 0
    assert cuda.cudaMemcpyAsync(host, device, c_size_t(4), 2, stream) == 0
    assert streams.wait(other, streams.recorded(stream)) == 0  # so that the other one's end is this one's as well
    assert cuda.cudaStreamSynchronize(other) == 0 and number[0] == 0


def test_a_host_function_runs_at_each_replay_and_may_not_call_cuda(streams: Streams) -> None:
    calls: list[int] = []

    @ctypes.CFUNCTYPE(None, c_void_p)
    def function(_: object) -> None:
        calls.append(streams.cuda.cudaDeviceSynchronize())

    origin = streams.begin()
    assert streams.cuda.cudaLaunchHostFunc(origin, function, None) == 0 and not calls
    assert streams.end(origin) == 0 and calls == [NOT_PERMITTED]
