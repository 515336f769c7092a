"""What one training step asks of a GPU: launches, bytes and layouts by phase, and the graph that a capture makes of it.

The step is `train_step` itself; its phases are told apart by the functions that it calls, so that they follow the code.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import retemper.engine.step as engine_step
from dry_run.record import Record, Recorder, illegal, waits
from dry_run.trace import Op, Trace
from retemper.engine.catalogue import find_setting
from retemper.engine.device import repeatable, tuned_convolutions
from retemper.engine.models import channels_last, create_model
from retemper.engine.recipe import Recipe
from retemper.engine.speed.capture import captured
from retemper.engine.state import State, clean_images
from retemper.errors import UsageError

PHASES = {  # functions of engine/step.py, and what they do in a step
    "observe": "teacher",
    "attacked_images": "attack",
    "observe_attacked": "teacher",
    "descend": "train",
}
IMAGES = {  # classes, side, channels
    "digits": (10, 8, 1),
    "fashion-mnist": (10, 28, 1),
    "cifar10": (10, 32, 3),
    "cifar100": (100, 32, 3),
    "svhn": (10, 32, 3),
    "tiny-imagenet": (200, 64, 3),
}
WARM_UP = 3  # steps after which nothing is made any more


@dataclass(frozen=True)
class Setting:
    """A step to count.

    Attributes:
        recipe: METHOD:SETTING.
        options: of the recipe, other than its own.
        given: the teacher's logits are known, as with a full table.
        deterministic: as with --deterministic.
    """

    recipe: str
    options: dict[str, Any] = field(default_factory=dict)
    batch: int = 128
    given: bool = False
    deterministic: bool = False


@dataclass(frozen=True)
class Counts:
    """What was counted of a step.

    Attributes:
        launches, bytes: by phase, in the order of the step.
        ops: every operator that launches something.
        nodes: of the captured step; 0 where it is not captured.
        replay: what a replay asks of CUDA, a line each, with how often.
        illegal, waits: what CUDA would refuse, and what makes the host wait, in the eager step and in the replay.
    """

    launches: dict[str, int]
    bytes: dict[str, int]
    ops: list[Op]
    nodes: int
    replay: dict[str, int]
    illegal: dict[str, int]
    waits: dict[str, int]

    @property
    def other_layouts(self) -> int:
        """How many operators of the attack read or write images in another layout than channels-last."""
        return sum(op.phase == "attack" and bool(op.layouts) for op in self.ops)


class Step:
    """A training step of a setting, on images of zeros.

    Args:
        setting: what to count.
    """

    def __init__(self, setting: Setting) -> None:
        device = torch.device("cuda")
        self.recipe = recipe = find_setting(setting.recipe)[2].recipe.replace(**setting.options)
        classes, side, channels = IMAGES[recipe.data.dataset]
        networks, normalise = recipe.networks, recipe.data.dataset if recipe.networks.normalise else None
        student = create_model(networks.student, classes, channels=channels, normalise=normalise)
        teacher, clean_teacher = (
            frozen(name, classes, channels, recipe) for name in (networks.teacher_model, networks.clean_teacher_model)
        )
        peer = create_model(networks.peer_model or networks.student, classes, channels=channels, normalise=normalise)
        peer = peer if recipe.method.trains_peer else None
        self.state = State(recipe, student, teacher, classes, device, clean_teacher, peer=peer)
        self.state.start_epoch(recipe, 1, 0)
        image = torch.zeros(setting.batch, side, side, channels, dtype=torch.uint8, device=device)
        index = torch.zeros(setting.batch, dtype=torch.int64, device=device)
        given = torch.zeros(setting.batch, classes, device=device) if setting.given else None
        self.augment = clean_images
        self.inputs = image, index, index.clone(), given

    def __call__(self, image: Tensor, view: Tensor, label: Tensor, teacher_BK: Tensor | None) -> Tensor:
        """Take the step; a loader gives its arguments."""
        clean = self.augment(self.recipe, image, view)
        return engine_step.train_step(self.state, self.recipe, clean, label, teacher_BK)

    @contextmanager
    def phases(self, begin: Callable[[str], None]) -> Iterator[None]:
        """Call `begin` with the name of each phase as it begins, and with that of the outer one as it ends."""
        places: list[tuple[Any, str, str]] = [(self, "augment", "augment"), (self.state, "attacked", "fold")]
        places += [(engine_step, name, phase) for name, phase in PHASES.items()]
        with ExitStack() as stack:
            for owner, name, phase in places:
                stack.enter_context(patch.object(owner, name, told(getattr(owner, name), phase, begin)))
            yield


def told(function: Callable[..., Any], phase: str, begin: Callable[[str], None]) -> Callable[..., Any]:
    """Return the function, which says that its phase begins and, at its end, that the rest of the step goes on."""

    @wraps(function)
    def telling(*args: Any, **kwargs: Any) -> Any:
        begin(phase)
        try:
            return function(*args, **kwargs)
        finally:
            begin("rest")

    return telling


def counted(setting: Setting, recorder: Recorder) -> Counts:
    """Count a step of the setting: eager by phase, operator by operator, and captured."""
    with repeatable() if setting.deterministic else tuned_convolutions():
        step = Step(setting)
        for _ in range(WARM_UP):
            step(*step.inputs)
        recorder.reset()
        with step.phases(lambda phase: recorder.mark(phase)):
            step(*step.inputs)
        eager = recorder.records()
        ops = traced(step, recorder)
        replay = replayed(step, recorder) if step.recipe.execution.captures_on(step.state.device) else []
    by_phase = launches(eager)
    seen, launched = sum(len(op.launches) for op in ops), sum(by_phase.values())
    assert abs(seen - launched) < 0.01 * launched, f"{seen} launches under the trace, {launched} without"
    bytes_by_phase = Counter[str]()
    for op in ops:
        bytes_by_phase[op.phase] += op.bytes
    return Counts(
        launches=by_phase,
        bytes=dict(bytes_by_phase),
        ops=ops,
        nodes=sum(one.bytes for one in replay if one.kind == "graph"),
        replay=dict(Counter(f"{one.kind}: {one.name}" for one in replay)),
        illegal=dict(illegal(eager) + illegal(replay)),
        waits=dict(waits(eager) + waits(replay)),
    )


def launches(records: list[Record]) -> dict[str, int]:
    """Return the number of launches in each phase that has any, in the order of the phases."""
    counts: dict[str, int] = {}
    phase = "rest"
    for record in records:
        if record.kind == "mark":
            phase = record.name
        elif record.is_work:
            counts[phase] = counts.get(phase, 0) + 1
    return counts


def traced(step: Step, recorder: Recorder) -> list[Op]:
    """Return the operators of one step that launch something."""
    recorder.reset()
    trace = Trace(recorder)

    def begin(phase: str) -> None:
        trace.phase = phase

    begin("rest")
    with step.phases(begin), trace:
        step(*step.inputs)
    return trace.ops(recorder.records())


def replayed(step: Step, recorder: Recorder) -> list[Record]:
    """Return the records of a replay of the captured step, or those of what was illegal before it."""
    fast = captured(step)
    recorder.reset()
    with suppress(UsageError):  # what CUDA refuses is in the record
        for _ in range(WARM_UP + 1):
            fast(*step.inputs)
    refused = [one for one in recorder.records() if one.is_illegal]
    if refused:
        return refused
    recorder.reset()
    fast(*step.inputs)
    return recorder.records()


def frozen(name: str | None, classes: int, channels: int, recipe: Recipe) -> nn.Module | None:
    """Return a teacher on the device, as a run places it; None for no name."""
    if name is None:
        return None
    network = create_model(name, classes, channels=channels).eval().requires_grad_(False)
    device = torch.device("cuda")
    return channels_last(network, device) if recipe.execution.channels_last else network.to(device)
