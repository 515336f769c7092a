"""What is captured beyond the training step, in a process of the recorder: python -m dry_run.replays FILE.

Each call below is made until it is replayed, and once more. That one must launch the graphs that it should and little
else, wait for nothing, and do nothing that CUDA would refuse. Writes to FILE a line for each call that does not.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dry_run.record import Recorder, illegal, waits
from dry_run.values import sound_values
from retemper.console import say
from retemper.engine import CapturedAttack, KlObjective, create_model, cross_entropy_objective
from retemper.engine.device import exact_fp32
from retemper.engine.models import channels_last
from retemper.engine.predict import ATTACKS, folded_twin
from retemper.engine.speed.replay import Replayed, graphs_for

GPU = torch.device("cuda")
BATCH, CLASSES, CALLS, EPS = 64, 10, 6, 8 / 255
NETWORKS = ("resnet18", "mobilenet_v2")


@dataclass(frozen=True)
class Replay:
    """A call that is replayed, the graphs that it launches, and how much else it may at most."""

    call: Callable[[], object]
    graphs: int = 1
    others: int = 6


class Waits(nn.Module):
    """A network that waits for the device, so that no graph can hold it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        logits = self.network(image)
        return logits if logits.sum().item() < 1 else -logits


def replays(name: str) -> Iterator[tuple[str, Replay]]:
    """Yield the calls on a network: attacks of the library, evaluation's, and what AutoAttack asks of a network."""
    network = channels_last(create_model(name, CLASSES), GPU).eval().requires_grad_(False)
    image = torch.zeros(BATCH, 3, 32, 32, device=GPU).contiguous(memory_format=torch.channels_last)
    label, teacher = torch.zeros(BATCH, dtype=torch.int64, device=GPU), torch.zeros(BATCH, CLASSES, device=GPU)
    given: dict[str, Any] = dict(steps=10, step=EPS / 4, eps=EPS)
    attack = CapturedAttack(network, cross_entropy_objective, **given)
    yield "pgd", Replay(lambda: attack(image, label, seed=1))
    distil = CapturedAttack(folded_twin(network, GPU), KlObjective, **given)
    yield "pgd on the KL, folded", Replay(lambda: distil(image, teacher, label, seed=1))
    with exact_fp32():
        for called in ("fgsm", "pgd20", "cw"):
            perturb = ATTACKS[called].on(folded_twin(network, GPU), EPS, graphs_for(GPU, network))
            yield called, Replay(partial(perturb, image, teacher, label, 1))
        asked = Replayed(network, graphs_for(GPU, network), BATCH)
        yield "answers", Replay(lambda: answers(asked, image))
        yield "the gradient at an image", Replay(lambda: gradient(asked, image, label), graphs=2, others=16)


@torch.no_grad()
def answers(network: nn.Module, image: Tensor) -> Tensor:
    return network(image)


def gradient(network: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    image = image.detach().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(network(image), label, reduction="sum"), image)
    return grad


def faults(recorder: Recorder, replay: Replay) -> Iterator[str]:
    """Yield what is wrong with a call once it is replayed."""
    for _ in range(CALLS):
        replay.call()
    recorder.reset()
    replay.call()
    records = recorder.records()
    graphs = sum(one.kind == "graph" for one in records)
    others = sum(one.is_work for one in records) - graphs
    if graphs != replay.graphs or others > replay.others:
        wanted = f"{replay.graphs} and at most {replay.others}"
        yield f"{graphs} graphs and {others} other launches: needs {wanted}"
    yield from (f"it waits: {what}" for what in waits(records))
    yield from (f"illegal: {what}" for what in illegal(records))


def after_a_failure() -> Iterator[str]:
    """Yield what is wrong after an attack on a network that cannot be recorded."""
    network = channels_last(create_model("resnet18", CLASSES), GPU).eval()
    image, label = torch.zeros(2, 3, 32, 32, device=GPU), torch.zeros(2, dtype=torch.int64, device=GPU)
    stream = torch.cuda.current_stream()
    for one in (Waits(network), network):
        attack = CapturedAttack(one, cross_entropy_objective, steps=1, step=EPS, eps=EPS)
        for _ in range(3):
            attack(image, label)
    if torch.cuda.current_stream() != stream:
        yield "another stream is the current one"
    torch.rand(1, device=GPU)  # PyTorch raises where it believes in a recording
    before = torch.cuda.memory_stats()["active.all.current"]
    other = torch.empty(1 << 20, device=GPU)
    other.record_stream(torch.cuda.Stream())
    del other
    torch.cuda.synchronize()
    for _ in range(4):  # each asks whether the stream is done
        torch.empty(1, device=GPU)
    if torch.cuda.memory_stats()["active.all.current"] > before:
        yield "memory that another stream used is not taken back"


def main() -> None:
    recorder, found = Recorder(), []
    with sound_values():
        for name in NETWORKS:
            for called, replay in replays(name):
                say(f"{name}: {called}")
                found += [f"{name}, {called}: {fault}" for fault in faults(recorder, replay)]
        found += [f"after a failure: {fault}" for fault in after_a_failure()]
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
