"""Counts the steps that have budgets, in a process of the recorder: python -m dry_run.counting FILE [NAME...].

Writes to FILE, for each setting: launches, megabytes and modelled milliseconds by phase, and the operators of the
attack with another layout; for each method the launches of its step on ResNet-18, and what is wrong with its capture.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

from dry_run import roofline
from dry_run.record import Recorder
from dry_run.step_count import Counts, Setting, counted
from dry_run.table import PHASES
from retemper.console import say
from retemper.engine.catalogue import method_module, methods

RESNET18 = Setting("absld:cifar10_resnet18")
MOBILENET_V2 = Setting("absld:cifar10_mobilenet_v2")
SETTINGS = {
    "ResNet-18": RESNET18,
    "ResNet-18, teacher known": replace(RESNET18, given=True),
    "ResNet-18, EMA": replace(RESNET18, options={"average": "ema"}),
    "ResNet-18, IGDM": replace(RESNET18, options={"igdm": 1.0}),
    "ResNet-18, AWP": replace(RESNET18, options={"awp_gamma": 0.01}),
    "ResNet-18, deterministic": replace(RESNET18, deterministic=True),
    "ResNet-18, attack in training mode (ARD)": Setting("ard:cifar10_resnet18"),
    "MobileNetV2": MOBILENET_V2,
    "MobileNetV2, teacher known": replace(MOBILENET_V2, given=True),
}
CAREFUL = 0.7  # of the tiles' efficiencies, for a second column: the model's largest doubt


def summary(counts: Counts) -> dict[str, Any]:
    """Return what the budgets and the table take from the counts of a setting."""
    slow = roofline.MACHINE.slower(CAREFUL)
    return {
        "launches": {phase: counts.launches.get(phase, 0) for phase in PHASES},
        "megabytes": {phase: ceil(counts.bytes.get(phase, 0) / 1e6) for phase in PHASES},
        "other layouts in the attack": counts.other_layouts,
        "model": {phase: 1e3 * time for phase, time in roofline.seconds(counts.ops).items()},
        "careful model": {phase: 1e3 * time for phase, time in roofline.seconds(counts.ops, slow).items()},
        "faults": list(faults(counts)),
    }


def faults(counts: Counts) -> Iterator[str]:
    """Yield a line for everything that a captured step must not do."""
    launched = sum(counts.launches.values())
    for what, number in counts.illegal.items():
        yield f"illegal, {number} times: {what}"
    for what, number in counts.waits.items():
        yield f"the host waits, {number} times: {what}"
    if not counts.nodes:
        yield "it is not captured"
    elif counts.nodes != launched:
        yield f"the graph has {counts.nodes} nodes, the eager step {launched} launches"
    extra = [line for line in counts.replay if not line.startswith(("graph: ", "memcpy: copy, device to device"))]
    if counts.nodes and extra:
        yield f"a replay does more than launch its graph: {', '.join(extra)}"


def step_of(method: str) -> Setting:
    """Return the step of a method on ResNet-18 and CIFAR-10."""
    names = method_module(method).SETTINGS
    return Setting(f"{method}:{next(name for name in names if name.startswith('cifar10_resnet18'))}")


def main() -> None:
    file, *names = sys.argv[1:]
    recorder = Recorder()
    content: dict[str, Any] = {"settings": {}, "methods": {}}
    for name, setting in SETTINGS.items():
        if not names or name in names:
            say(name)
            content["settings"][name] = summary(counted(setting, recorder))
    for method in methods():
        if not names or method in names:
            say(method)
            counts = counted(step_of(method), recorder)
            content["methods"][method] = {"launches": sum(counts.launches.values()), "faults": list(faults(counts))}
    Path(file).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
