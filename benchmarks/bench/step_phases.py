"""The phases of our training step, each alone: their times, and a profile that tells their kernels."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from retemper.bench.case import Call, Contender, Request
from retemper.bench.step_problem import StepProblem
from retemper.bench.step_variants import whole
from retemper.engine.device import tuned_convolutions
from retemper.engine.maximise import attack
from retemper.engine.recipe import Recipe
from retemper.engine.speed.capture import WARM_UP, CudaGraphs
from retemper.engine.step import descend, observe, train_step

CPU_BATCH = {"tiny_resnet": 128, "mobilenet_v2": 8, "resnet18": 4}
PHASES = ("folding", "teacher", "attack", "the same with SGD and class sums")  # which make up a step
PROFILED_STEPS = 3


def tuned(call: Call) -> Call:
    """Return `call` as training makes it: with the fastest convolutions that cuDNN finds for its shapes."""

    def tuned_call() -> Any:
        with tuned_convolutions():
            return call()

    return tuned_call


def phases(problem: StepProblem, recipe: Recipe) -> tuple[dict[str, Call], dict[str, Tensor]]:
    """Return the parts of a step on the first batch, each to be called alone, and its attacked and clean images."""
    state, (clean, label) = problem.state(recipe), problem.first
    clean = problem.layout(clean, recipe)
    attacked = state.attacked()
    targets = observe(state, recipe, attacked, clean, label, None)
    images = {"adv": attack(state, recipe, attacked, clean, targets).clone(), "clean": clean}

    def forwards_and_backward() -> None:
        state.student.train()
        with state.autocast():
            logits = {name: state.student(image) for name, image in images.items()}
            loss = recipe.method.loss(logits, targets)
        loss.backward()
        state.optimizer.zero_grad(set_to_none=True)

    parts: dict[str, Call] = {
        "whole step": lambda: train_step(state, recipe, clean, label),
        "teacher": lambda: observe(state, recipe, attacked, clean, label, None),
        "folding": lambda: state.attacked(),
        "attack": lambda: attack(state, recipe, attacked, clean, targets),
        "two forwards, backward": forwards_and_backward,
        "the same with SGD and class sums": lambda: descend(state, recipe, images, targets),
    }
    return parts, images


def phase_rows(problem: StepProblem) -> list[Contender]:
    """Return the parts of the whole step as contenders, each alone, to see which one takes the time.

    On a GPU each is replayed from a CUDA graph of its own: eager, Python's launches would be what is timed.
    """
    parts, _ = phases(problem, whole(problem, captured=False))
    calls = {name: in_a_graph(part) if problem.request.on_gpu else tuned(part) for name, part in parts.items()}
    return [Contender(name=name, call=call, exactness="rounding") for name, call in calls.items()]


def in_a_graph(part: Call) -> Call:
    """Return a call that replays `part` from a CUDA graph, with the convolutions that `tuned` would give it."""
    nothing, stream = torch.empty(0, device="cuda"), torch.cuda.Stream()

    def work() -> Tensor:
        part()
        return nothing

    with tuned_convolutions():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # as `captured` does: what is allocated here must not be the default stream's
            for _ in range(WARM_UP):
                part()
        torch.cuda.current_stream().wait_stream(stream)
        return CudaGraphs()(work)[0]


def slowest_phase(rows: list[dict[str, Any]]) -> str | None:
    """Return a line that names the phase which takes the most of a step, of the rows of `phase_rows`."""
    ms = {row["name"]: row["ms"]["median"] for row in rows if row["name"] in PHASES and row["ms"]}
    if len(ms) < len(PHASES):
        return None
    name, whole_ms = max(ms, key=lambda name: ms[name]), sum(ms.values())
    share = f"{ms[name]:.3g} ms of {whole_ms:.3g} ms ({ms[name] / whole_ms:.0%})"
    return f"{rows[0]['table']}: the slowest is {name}, {share}"


def profile_step(request: Request, folder: str | Path) -> None:
    """Print where the time of the whole step goes, from torch's profiler.

    The step is run eager, not from a graph, so that a kernel can be told to a phase; the kernels are the same.

    Args:
        folder: profile_STUDENT.txt and profile_STUDENT.json.gz (for a trace viewer) are written into it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for student in ("resnet18", "mobilenet_v2") if request.on_gpu else ("tiny_resnet",):
        (batch,) = request.batches((128 if request.on_gpu else CPU_BATCH[student],), 16)
        problem = StepProblem(request, student, batch)
        parts, _ = phases(problem, whole(problem, captured=False))

        def steps(parts: dict[str, Call] = parts) -> None:
            for _ in range(PROFILED_STEPS):
                for name in PHASES:
                    with record_function(f"phase: {name}"), tuned_convolutions():
                        parts[name]()

        steps()
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if request.on_gpu else [])]
        with profile(activities=kinds) as profiled:
            steps()
        order = "device_time_total" if request.on_gpu else "cpu_time_total"
        table = profiled.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90)
        (folder / f"profile_{student}.txt").write_text(f"{PROFILED_STEPS} steps, {student}, batch {batch}\n{table}\n")
        profiled.export_chrome_trace(str(folder / f"profile_{student}.json.gz"))
        print(table)
