"""Takes steps that PyTorch watches for waits, in a process of the recorder: python -m dry_run.syncs FILE.

Every method on the digits, with each option that adds work to a step. PyTorch raises where it would wait for the
device. Writes to FILE a line for each step that failed.
"""

import json
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dry_run.record import Recorder, illegal
from dry_run.step_count import Setting, Step
from retemper.console import say
from retemper.engine.catalogue import method_module, methods

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"precision": "fp32"},
    {"precision": "fp16"},
    {"average": "ema", "ema_warmup": True},
    {"optimizer": "adamw", "decay_norms": False, "lr_schedule": "onecycle"},
    {"average": "swa"},
    {"awp_gamma": 0.01},
    {"fused_sgd": False},
    {"channels_last": False},
    {"fold": False},
)
BATCH, ATTACK_STEPS = 32, 2


@contextmanager
def no_waits() -> Iterator[None]:
    """Have PyTorch raise inside where it would wait for the device."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def failure(name: str, options: dict[str, Any], recorder: Recorder) -> str | None:
    """Return what is wrong with the second step of a setting, in a line; None if nothing is."""
    step = Step(Setting(name, {"attack_steps": ATTACK_STEPS, **options}, batch=BATCH))
    step(*step.inputs)
    recorder.reset()
    try:
        with no_waits():
            step(*step.inputs)
    except RuntimeError as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{name} {options}: {str(error).splitlines()[0]} ({Path(place.filename).name}:{place.lineno})"
    refused = illegal(recorder.records())
    return f"{name} {options}: illegal: {', '.join(refused)}" if refused else None


def main() -> None:
    recorder = Recorder()
    failures = []
    for method in methods():
        say(method)
        name = next(name for name in method_module(method).SETTINGS if name.startswith("digits"))
        failures += [failure(f"{method}:{name}", options, recorder) for options in OPTIONS]
    Path(sys.argv[1]).write_text(json.dumps([one for one in failures if one], indent=1) + "\n")


if __name__ == "__main__":
    main()
