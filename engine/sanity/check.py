"""Whether robustness numbers can be trusted: every flag, the numbers behind them, and a verdict.

`retemper evaluate NETWORK --check` writes it into evaluation.json; `check` is for a network of one's own.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from retemper.console import say
from retemper.engine.attack import module_mode
from retemper.engine.checkpoints.header import Facts, find_weights, is_run, load_network, read_facts
from retemper.engine.device import exact_fp32
from retemper.engine.run.run_folder import RunFolder
from retemper.engine.sanity.flags import (
    Flag,
    black_box,
    few_classes,
    logit_scale,
    more_starts,
    more_steps,
    noise,
    not_finite_gradients,
    not_finite_weights,
    off_slope,
    probabilities,
    radius_end,
    radius_rises,
    random_outputs,
    single_step,
    square_helps,
    training_mode,
    transfer,
    underflow,
    zero_gradients,
    zero_radius,
)
from retemper.engine.sanity.gradients import probe_gradients
from retemper.engine.sanity.ladder import Subject, climb, fraction
from retemper.errors import DataError, UsageError
from retemper.files import file_digest, finite

IMAGES = 300  # of the evaluated ones, balanced over the classes, are checked: masking shows on many, and this is quick
OF_GRADIENTS = (zero_gradients, not_finite_gradients, underflow, off_slope)
OF_LADDER = (zero_radius, radius_rises, radius_end, more_steps, more_starts, single_step, noise, transfer, black_box)
ADVICE = ("few_classes",)  # says which attacks make sense, and nothing against the network


def check(subject: Subject, teacher: nn.Module | None = None, more: tuple[Flag, ...] = ()) -> dict[str, Any]:
    """Every flag, the numbers behind them, and the verdict: "suspect" where one is raised that is no mere advice.

    Args:
        subject: its network is put into eval mode for the time; whether it was there before is a flag.
        teacher: what the network learned from: the attack on it should transfer badly.
        more: flags found elsewhere, for the verdict.
    Returns:
        What evaluation.json holds under "checks": verdict, flags, ladder, images, seconds.
    """
    started, model = time.monotonic(), subject.model
    flags = [training_mode(model), not_finite_weights(model)]
    with module_mode(model, "eval"), exact_fp32():
        batches = [image for _, image, _ in subject.batches()]
        with torch.no_grad():
            logits_NK = torch.cat([model(image).float() for image in batches])
        flags += [random_outputs(model, batches[0])]
        probes, ladder = probe_gradients(subject), climb(subject, teacher)
    flags += [probabilities(logits_NK), few_classes(logits_NK.shape[1]), logit_scale(logits_NK)]
    flags += [flag(probes) for flag in OF_GRADIENTS] + [flag(ladder) for flag in OF_LADDER] + [*more]
    checks = {
        "verdict": "suspect" if any(flag.raised and flag.name not in ADVICE for flag in flags) else "ok",
        "flags": [asdict(flag) for flag in flags],
        "ladder": {
            "radius": [{"eps": eps, "accuracy": fraction(left_N)} for eps, left_N in ladder.radius.items()],
            "attack": {name: fraction(left_N) for name, left_N in ladder.attack.items()},
            "white_box": fraction(ladder.white_box),
            "gradients": probes,
        },
        "images": len(subject.indices),
        "seconds": time.monotonic() - started,
    }
    return finite(checks)


def check_evaluated(subject: Subject, folder: Path | None, attacks: Mapping[str, Any]) -> dict[str, Any]:
    """`check`, with the teacher that the run in `folder` names, and Square's part in AutoAttack.

    Args:
        folder: None, or no run's, where there is no teacher to ask for.
        attacks: of evaluation.json.
    """
    suite = attacks.get("autoattack", {})
    broken = suite.get("broken_by", {}).get("square")
    more = () if broken is None else (square_helps(broken, sum(suite["count"])),)
    return check(subject, None if folder is None else _teacher(subject, folder), more)


def check_lines(checks: Mapping[str, Any]) -> list[str]:
    """For the terminal: the verdict, and a line for every raised flag."""
    seen = f"{len(checks['flags'])} checks on {checks['images']} images"
    head = f"{seen}: none speaks against these numbers"
    if checks["verdict"] != "ok":
        head = f"SUSPECT, {seen}: gradients are masked or misleading; the robustness numbers are not to be trusted"
    return [head, *(f"  {flag['name']}: {flag['text']}" for flag in checks["flags"] if flag["raised"])]


def _teacher(subject: Subject, folder: Path) -> nn.Module | None:
    """The very network that the run learned from; None where it had none, or its file is gone or another by now."""
    named = RunFolder(folder).read_config()["teacher"] if is_run(folder) else None
    if named is None:
        return None
    try:
        weights = find_weights(Path(named["path"]))
        if file_digest(weights) != named["sha256"]:
            raise DataError(f"{weights} is not the teacher any more that this run learned from")
        _, _, channels = subject.split.shape
        known = Facts(model=named["model"], num_classes=len(subject.split.classes), channels=channels)
        return load_network(weights, read_facts(weights).or_else(known), subject.device)
    except (DataError, UsageError) as error:
        say(f"checks: no attack on the teacher: {error}")
        return None
