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
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from retemper.bench.authors_step import CarefulStep
from retemper.bench.case import NOT_WANTED, Call, Case, Contender, PlannedCase, Request, Work
from retemper.bench.step_phases import CPU_BATCH, phase_rows, phases, slowest_phase, tuned
from retemper.bench.step_problem import AGREEMENT, TEACHERS, StepProblem
from retemper.bench.step_variants import ADDITIONS, AHEAD, OTHERWISE, Variant, changed, whole
from retemper.bench.timing import failure
from retemper.engine.device import in_precision
from retemper.engine.recipe import Recipe
from retemper.engine.speed.capture import captured
from retemper.engine.step import train_step


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
        conclude=slowest_phase if rows is phase_rows else lambda rows: None,
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
    """Return our step under `recipe`; one that cannot be made leaves the others their times."""
    reason = NOT_WANTED
    if problem.request.wants(variant.name):
        try:
            return checked(problem, recipe, variant)
        except Exception as error:
            traceback.print_exc()
            reason = failure(error)
    return Contender(name=variant.name, exactness=variant.exactness, reason=reason)


def checked(problem: StepProblem, recipe: Recipe, variant: Variant) -> Contender:
    """Return our step under `recipe`, timed only if its attack on the first batch is as strong as the script's."""
    reason = variant.gpu if variant.gpu and not problem.request.on_gpu else None
    if recipe.execution.epilogue == "compiled" and (problem.request.quick or not problem.request.on_gpu):
        reason = "compiling is left out by --quick and on a CPU"
    if reason is None and problem.request.checked:
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
