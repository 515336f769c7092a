"""An attack whose calls are replayed from a CUDA graph: the host makes a few launches in place of thousands."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from retemper.console import say_once
from retemper.engine.attack import is_recorded, pgd
from retemper.engine.attack_plan import Plan
from retemper.engine.losses import Objective
from retemper.engine.speed.capture import CudaGraphs, Record, Recordings, why
from retemper.engine.speed.replay import fingerprint, held_by, why_eager

MOST = 8  # recordings that are kept: those of the last calls


class CapturedAttack:
    """The attack `pgd` on one model, which from the second call of its kind on is replayed from a CUDA graph.

        attack = CapturedAttack(model, cross_entropy_objective, steps=20, step=2 / 255, eps=8 / 255)
        adv = attack(image, label)

    It is an object, and `pgd` stays as it is, since a graph repeats the work that was recorded and runs no Python: who
    makes the object says that the model's code does the same work at every call, and how long the memory is kept.

    Calls are of a kind where their shapes, their options and the model agree: its tensors lie where they lay, no module
    is in another mode, no number in it and no precision of torch has changed. Weights may change in place. What else
    the code of the model or of the objective looks at counts as it was when it was recorded. A random start without a
    seed, and dropout, draw anew at every call. Recordings of up to 8 kinds share their memory. Values are checked at
    the first call of a kind alone, as each check makes the host wait.

    On a CPU, inside torch.compile or another recording, and for what cannot be recorded, of which one line tells on
    stderr, calls are those of `pgd`: a callable that is no module, a model with hooks, over several devices, or that
    waits for the device. Threads may share it: they take turns.

    Args:
        model: as for `pgd`.
        objective: takes the tensors behind the images in a call and returns an objective of `pgd`.
        record: in tests, a stand-in for `CudaGraphs`.
        options: as for `pgd`, without `watch`: those that calls do not give.
    Raises:
        TypeError: an option is unknown, or missing.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        objective: Callable[..., Objective],
        *,
        record: Record | None = None,
        **options: Any,
    ) -> None:
        self.model, self.objective, self.plan = model, objective, Plan(**options)
        self._record, self._lock = record, RLock()
        self._recordings: Recordings | None = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, clean: Tensor, *targets: Tensor, **options: Any) -> Tensor:
        """Return what `pgd` returns.

        Args:
            clean: as for `pgd`.
            targets: what the objective is made of: labels, a teacher's logits.
            options: of `pgd`, in place of those that the object was made with.
        Raises:
            TypeError, ValueError: as `pgd`.
        """
        plan = replace(self.plan, **options) if options else self.plan
        if not self._replays(clean, targets):
            return self._attack(clean, targets, plan)
        with self._lock, torch.inference_mode(False), self._in_order(clean.device):
            return self._replayed(clean, targets, plan)

    @contextmanager
    def _in_order(self, device: torch.device) -> Iterator[None]:
        """Let the work inside begin after that of the last call, which may have been on another stream."""
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            if self._stream not in (None, stream):
                stream.wait_stream(self._stream)
                for kind in self._recordings.kinds.values() if self._recordings else ():
                    kind.used_on(stream)
            self._stream = stream
            yield

    def _attack(self, clean: Tensor, targets: tuple[Tensor, ...], plan: Plan) -> Tensor:
        """Return the attacked images."""
        return pgd(self.model, clean, objective=self.objective(*targets), **vars(plan))

    def _replays(self, clean: Tensor, targets: tuple[Tensor, ...]) -> bool:
        """Say whether a call may be replayed."""
        if self._record is None and not (isinstance(clean, Tensor) and clean.is_cuda):
            return False
        if is_recorded() or {*map(type, (clean, *targets))} - {Tensor, nn.Parameter} or not clean.numel():
            return False
        reason = why_eager(self.model)
        if reason:
            say_once(f"note: this attack runs without a CUDA graph: {reason}")
        return not reason

    def _replayed(self, clean: Tensor, targets: tuple[Tensor, ...], plan: Plan) -> Tensor:
        """Run or replay the attack; its tensors, and the seed, are what a replay reads anew."""
        if isinstance(plan.seed, int):
            plan = replace(plan, seed=torch.full((1,), plan.seed, dtype=torch.int64, device=clean.device))
        tensors: dict[str, Any] = {name: value for name, value in vars(plan).items() if isinstance(value, Tensor)}
        fixed: dict[str, Any] = {name: value for name, value in vars(plan).items() if name not in tensors}

        def work(clean: Tensor, *own: Tensor) -> Tensor:
            given: dict[str, Any] = dict(zip(tensors, own[len(targets) :], strict=True))
            return self._attack(clean, own[: len(targets)], Plan(**fixed, **given))

        phase = self._phase(tuple(fixed.items()), tuple(tensors), clean.device)
        if phase is None:
            return self._attack(clean, targets, plan)
        if self._recordings is None:
            record = self._record or CudaGraphs(clean.device)
            self._recordings = Recordings(record, warm_up=1, most=MOST, name="this attack")
        return self._recordings(work, (clean, *targets, *tensors.values()), phase)

    def _phase(self, fixed: Hashable, names: Hashable, device: torch.device) -> Hashable:
        """Return what decides, beside tensors, which work is done; None where it cannot be told, which a line says."""
        assert isinstance(self.model, nn.Module)
        try:
            phase = fixed, names, fingerprint(self.model, device), held_by(self.objective)
            hash(phase)
        except Exception as error:  # what a model or an option holds may be anything
            say_once(f"note: this attack runs without a CUDA graph: {why(error)}")
            return None
        return phase
