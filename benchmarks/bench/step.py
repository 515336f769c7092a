"""The training step, option by option: the authors' script, then each thing that makes ours faster, then all but one.

One ABSLD step (variant `released`, which is what the script computes): the teacher on the clean images, PGD-10 on the
student in eval mode, two forwards in train mode, one backward, SGD. Every row starts from the same weights, images and
noise (the script from that of the row's memory format) and is checked before it is timed, see step_problem.py; a step
in a CUDA graph must also have the eager step's losses. `ratio` is a row's time in the first row's: below 1 is faster
than the authors' script. Rows that do not ask the teacher in each step have less to do than the table's work; their
TFLOP/s count what they do.

    retemper bench step --profile DIR       where the time goes: a table and a trace for each student
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from retemper.bench.authors_step import CarefulStep
from retemper.bench.case import Call, Case, Contender, PlannedCase, Request, Work
from retemper.bench.step_problem import AGREEMENT, TEACHERS, StepProblem
from retemper.engine.device import in_precision, tuned_convolutions
from retemper.engine.recipe import Recipe
from retemper.engine.speed.capture import captured
from retemper.engine.step import attack, descend, observe, train_step

CPU_BATCH = {"tiny_resnet": 128, "mobilenet_v2": 8, "resnet18": 4}
AHEAD = 8  # batches that the teacher is asked about at once
PROFILED_STEPS = 3
NO_GRAPH = "CUDA graphs need a GPU"


@dataclass(frozen=True)
class Variant:
    """A variant of our step: one or more options changed.

    Attributes:
        changes: fields of the recipe.
        exactness: of the change.
        gpu: why it is left out on a CPU; None where it is not.
        logits: who gives the teacher's logits: the "step", the teacher for AHEAD batches at once ("ahead"), or a
            "table".
    """

    name: str
    changes: dict[str, Any]
    exactness: str
    gpu: str | None = None
    logits: str = "step"


ADDITIONS = (  # each to the one before
    Variant("vectorised", {}, "rounding"),
    Variant("+ channels-last", dict(channels_last=True), "rounding"),
    Variant(
        "+ bf16", dict(precision="bf16"), "lower precision", "bf16 is slower than fp32 on a CPU without matrix units"
    ),
    Variant("+ fused SGD", dict(fused_sgd=True), "rounding"),
    Variant("+ folded batch norm", dict(fold=True), "rounding"),
    Variant("+ fused epilogues", dict(epilogue="fused"), "rounding", "on a CPU convolutions add their bias themselves"),
    Variant("+ forwards together", dict(together="on"), "rounding", "on a CPU it saves no launch"),
    Variant("+ CUDA graph", dict(capture="on"), "bitwise", NO_GRAPH),
    Variant(f"+ teacher for {AHEAD} batches at once", {}, "rounding", logits="ahead"),
    Variant("+ table, every view known", {}, "rounding", logits="table"),
)
OTHERWISE = (  # all additions but for one thing, asking the teacher in each step
    Variant("all but channels-last", dict(channels_last=False), "rounding"),
    Variant("all but bf16", dict(precision="fp32"), "rounding", "not used on a CPU"),
    Variant("all but fused SGD", dict(fused_sgd=False), "rounding"),
    Variant("all but folded batch norm", dict(fold=False, epilogue="plain"), "rounding"),
    Variant("all but fused epilogues", dict(epilogue="plain"), "rounding", "not used on a CPU"),
    Variant("all but forwards together", dict(together="off"), "rounding", "not used on a CPU"),
    Variant("all but the graph", dict(capture="off"), "bitwise", "not used on a CPU"),
    Variant("twin compiled instead of fused", dict(epilogue="compiled"), "rounding"),
)


def cases(request: Request) -> Iterator[PlannedCase]:
    """Yield three cases for each student and batch: addition by addition, all but one, and the phases of the whole.

    On a GPU convolutions are in TF32, as the script has them; at batch 128 the first case comes in strict fp32 too.
    """
    for student in TEACHERS:
        usual = (128, 1024) if request.on_gpu else (CPU_BATCH[student],)
        for batch in request.batches(usual, 2):
            for name, rows in (("ladder", one_by_one), ("all but one", all_but_one), ("phases", phase_rows)):
                title = f"{name}, {student} batch {batch}"
                yield PlannedCase(title, partial(_case, title, request, student, batch, rows))
            if request.on_gpu and batch == 128:
                title = f"ladder in strict fp32, {student} batch {batch}"
                rows = partial(one_by_one, strict=True)
                yield PlannedCase(title, partial(_case, title, request, student, batch, rows, "fp32"))


def _case(
    title: str,
    request: Request,
    student: str,
    batch: int,
    rows: Callable[[StepProblem], list[Contender]],
    precision: str = "tf32",
) -> Case:
    """Return a case with convolutions in `precision`; its bound is that of bf16 where a row uses it."""
    with in_precision(precision):
        problem = StepProblem(request, student, batch)
        contenders = rows(problem)
    slow = student != "tiny_resnet" and not request.on_gpu
    return Case(
        name=title,
        contenders=contenders,
        work=Work() if rows is phase_rows else problem.work(),
        precision=precision,
        bound="bf16" if request.on_gpu and precision == "tf32" else "fp32",
        rounds=5 if slow else None,
        warm_up=1 if slow else 3,
    )


def one_by_one(problem: StepProblem, strict: bool = False) -> list[Contender]:
    """Return the script, a careful user's step, and ours, each with one thing more; if strict, without bf16."""
    rows, recipe = peers(problem), problem.recipe
    for variant in ADDITIONS:
        if strict and variant.changes.get("precision") == "bf16":
            continue
        recipe = changed(problem, recipe, variant)
        rows.append(ours(problem, recipe, variant))
    return rows


def all_but_one(problem: StepProblem) -> list[Contender]:
    """Return our whole step, and the whole with one thing taken away or done otherwise."""
    recipe = whole(problem)
    variants = (Variant("all", {}, "rounding"), *OTHERWISE)
    return [ours(problem, changed(problem, recipe, variant), variant) for variant in variants]


def changed(problem: StepProblem, recipe: Recipe, variant: Variant) -> Recipe:
    """Return the recipe with the variant's changes, if they are for this device."""
    possible = variant.gpu is None or problem.request.on_gpu
    return recipe.replace(**variant.changes) if possible else recipe


def whole(problem: StepProblem, captured: bool = True) -> Recipe:
    """Return the recipe with all additions, asking the teacher in each step."""
    recipe = problem.recipe
    for variant in ADDITIONS:
        if captured or "capture" not in variant.changes:
            recipe = changed(problem, recipe, variant)
    return recipe


def peers(problem: StepProblem) -> list[Contender]:
    """Return the script, the baseline of every ratio, and the step in careful PyTorch, eager and compiled."""

    def each_batch(step: Callable[[Tensor, Tensor], object]) -> Call:
        turns = cycle(problem.batches)
        return lambda: step(*next(turns))

    def careful(compile: bool) -> Call:
        student = copy.deepcopy(problem.student)
        return tuned(each_batch(CarefulStep(student, problem.teacher, problem.temperatures, compile)))

    rows = [Contender(name="released script", call=each_batch(problem.authors()))]
    if problem.request.on_gpu:
        free = each_batch(problem.authors(deterministic=False))
        rows.append(Contender(name="released, any convolution", call=free))
    rows.append(Contender(name="careful PyTorch", call=careful(compile=False)))
    name = "careful PyTorch, torch.compile"
    if problem.request.quick or not problem.request.on_gpu:
        reason = "left out by --quick" if problem.request.quick else "takes minutes to compile on a CPU: left out"
        return [*rows, Contender(name=name, reason=reason)]
    return [*rows, Contender(name=name, call=careful(compile=True), compiled=True)]


def ours(problem: StepProblem, recipe: Recipe, variant: Variant) -> Contender:
    """Return our step under `recipe`, timed only if its attack on the first batch is as strong as the script's."""
    reason = variant.gpu if variant.gpu and not problem.request.on_gpu else None
    if recipe.execution.epilogue == "compiled" and (problem.request.quick or not problem.request.on_gpu):
        reason = "compiling is left out by --quick and on a CPU"
    if reason is None:
        missed = problem.misses(phases(problem, recipe)[1]["adv"], recipe) or replays_wrongly(problem, recipe)
        reason = f"disagrees: {missed}" if missed else None
    if reason is not None:
        return Contender(name=variant.name, exactness=variant.exactness, reason=reason)
    return Contender(
        name=variant.name,
        call=tuned(our_step(problem, recipe, variant.logits)),
        exactness=variant.exactness,
        check=None if variant.logits == "ahead" else partial(problem.misses_loss, recipe=recipe),
        calls=AHEAD if variant.logits == "ahead" else 1,
        work=problem.work(teacher=False) if variant.logits == "table" else None,
    )


def tuned(call: Call) -> Call:
    """Return `call` as training makes it: with the fastest convolutions that cuDNN finds for its shapes."""

    def tuned_call() -> Any:
        with tuned_convolutions():
            return call()

    return tuned_call


def replays_wrongly(problem: StepProblem, recipe: Recipe) -> str | None:
    """Return why the losses of a step from a CUDA graph are not the eager step's; None if they are, or without one."""
    if not recipe.execution.captures_on(problem.device):
        return None
    losses = []
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    try:
        for one in (recipe.replace(capture="off"), recipe):
            step = our_step(problem, one, "step")
            losses.append([float(step()) for _ in range(6)])
    finally:
        torch.backends.cudnn.deterministic = before
    same = all(abs(one / other - 1) <= AGREEMENT for one, other in zip(*losses, strict=True))
    return None if same else f"replayed, its losses are {losses[1]}, eager {losses[0]}"


def our_step(problem: StepProblem, recipe: Recipe, logits: str) -> Call:
    """Return a call that makes one step on the next batch; with logits "ahead", AHEAD steps."""
    state = problem.state(recipe)

    def step(clean: Tensor, label: Tensor, teacher_BK: Tensor | None = None) -> Tensor:
        return train_step(state, recipe, clean, label, teacher_BK)

    step = captured(step) if recipe.execution.captures_on(problem.device) else step
    batches = [(problem.layout(clean, recipe), label) for clean, label in problem.batches]
    if logits == "step":
        turns = cycle(batches)
        return lambda: step(*next(turns))

    @torch.no_grad()
    def with_answers() -> list[tuple[Tensor, Tensor, Tensor]]:
        assert state.teacher is not None
        images = [clean for clean, _ in batches]
        if problem.device.type == "cpu":  # where one large batch is no faster than its parts
            answers = [state.teacher(part).float() for part in images]
        else:
            with state.autocast():
                together = state.teacher(problem.layout(torch.cat(images), recipe))
            answers = together.float().split(problem.batch)
        return [(*given, teacher_BK) for given, teacher_BK in zip(batches, answers, strict=True)]

    if logits == "table":
        known = cycle(with_answers())
        return lambda: step(*next(known))

    def ahead() -> None:
        for given in with_answers():
            step(*given)

    return ahead


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
    """Return the parts of the whole step as contenders, each alone and eager, to see which one takes the time."""
    parts, _ = phases(problem, whole(problem, captured=False))
    return [Contender(name=name, call=tuned(part), exactness="rounding") for name, part in parts.items()]


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
                for name in ("folding", "teacher", "attack", "the same with SGD and class sums"):
                    with record_function(f"phase: {name}"):
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
