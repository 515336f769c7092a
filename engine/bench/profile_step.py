"""Where the time of a step goes: every phase under torch's profiler, a table and a trace for each student.

The step is run eager, not from a graph, so that a kernel can be told to a phase; the kernels are the same.
"""

from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from retemper.engine.bench.plan import Request
from retemper.engine.bench.step import CPU_BATCH, Scene, whole
from retemper.engine.step import attack, descend, observe

STEPS = 3


def profile_step(request: Request, folder: Path) -> None:
    """Write profile_STUDENT.txt and profile_STUDENT.json.gz (for a trace viewer) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for student in ("resnet18", "mobilenet_v2") if request.on_gpu else ("tiny_resnet",):
        (batch,) = request.batches((128 if request.on_gpu else CPU_BATCH[student],), 16)
        step = phased_step(Scene(request, student, batch))
        for _ in range(3):
            step()
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if request.on_gpu else [])]
        with profile(activities=kinds) as profiled:
            for _ in range(STEPS):
                step()
        order = "device_time_total" if request.on_gpu else "cpu_time_total"
        averages = profiled.key_averages()
        table = averages.table(sort_by=order, row_limit=60, max_name_column_width=90)
        (folder / f"profile_{student}.txt").write_text(f"{STEPS} steps, {student}, batch {batch}\n{table}\n")
        profiled.export_chrome_trace(str(folder / f"profile_{student}.json.gz"))
        print(table)


def phased_step(scene: Scene) -> Callable[[], None]:
    """The whole step on the first batch, each phase under its name."""
    recipe, (clean, label) = whole(scene, captured=False), scene.first
    state, clean = scene.state(recipe), scene.layout(clean, recipe)

    def step() -> None:
        with record_function("phase: fold"):
            attacked = state.attacked()
        with record_function("phase: teacher"):
            targets = observe(state, recipe, attacked, clean, label, None)
        with record_function("phase: attack"):
            adv = attack(state, recipe, attacked, clean, targets)
        with record_function("phase: train"):
            descend(state, recipe, {"adv": adv, "clean": clean}, targets)

    return step
