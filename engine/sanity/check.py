"""The check of a network's robustness numbers: every flag, the numbers behind them, and a verdict.

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
from retemper.engine.checkpoints.find import find_network, same_network
from retemper.engine.checkpoints.header import Facts, is_run
from retemper.engine.device import exact_fp32
from retemper.engine.run.job import default_cache
from retemper.engine.run.run_folder import RunFolder
from retemper.engine.sanity import flags
from retemper.engine.sanity.flags import Flag
from retemper.engine.sanity.gradients import probe_gradients
from retemper.engine.sanity.ladder import CheckRequest, Ladder, climb, fraction
from retemper.errors import DataError, UsageError
from retemper.files import finite

IMAGES = 300  # of the evaluated ones, balanced over the classes, are checked: masking shows on many, and this is quick


def check(request: CheckRequest, teacher: nn.Module | None = None, more: tuple[Flag, ...] = ()) -> dict[str, Any]:
    """Look for masked gradients. The verdict is "suspect" if a flag is raised that is more than advice, else "ok".

    Args:
        request: its network is put into eval mode for the time; whether it was there before is a flag.
        teacher: what the network learned from: the attack on it should transfer badly.
        more: flags found elsewhere, for the verdict.
    Returns:
        What evaluation.json holds under "checks": verdict, flags, ladder, images, seconds.
    """
    started, model = time.monotonic(), request.model
    found = [flags.training_mode(model), flags.not_finite_weights(model)]
    with module_mode(model, "eval"), exact_fp32():
        batches = [image for _, image, _ in request.batches()]
        with torch.no_grad():
            logits_NK = torch.cat([model(image).float() for image in batches])
        found += [flags.random_outputs(model, batches[0])]
        probes, ladder = probe_gradients(request), climb(request, teacher)
    found += [flags.probabilities(logits_NK), flags.few_classes(logits_NK.shape[1]), flags.logit_scale(logits_NK)]
    found += [flag(probes) for flag in flags.OF_GRADIENTS] + [flag(ladder) for flag in flags.OF_LADDER] + [*more]
    checks = {
        "verdict": "suspect" if any(flag.raised and flag.name not in flags.ADVICE for flag in found) else "ok",
        "flags": [asdict(flag) for flag in found],
        "ladder": _accuracies(ladder) | {"gradients": probes},
        "images": len(request.indices),
        "seconds": time.monotonic() - started,
    }
    return finite(checks)


def _accuracies(ladder: Ladder) -> dict[str, Any]:
    """Return the fraction of images that stayed correct on every rung, as evaluation.json holds it."""
    return {
        "radius": [{"eps": eps, "accuracy": fraction(left_N)} for eps, left_N in ladder.radius.items()],
        "attack": {name: fraction(left_N) for name, left_N in ladder.attack.items()},
        "white_box": fraction(ladder.white_box),
    }


def check_evaluated(request: CheckRequest, folder: Path | None, attacks: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result of `check` with the teacher that the run in `folder` names, and with a flag on AutoAttack.

    Args:
        folder: a run's; with None or any other folder there is no teacher to ask for.
        attacks: the results of evaluation.json.
    """
    suite = attacks.get("autoattack", {})
    broken = suite.get("broken_by", {}).get("square")
    more = () if broken is None else (flags.square_helps(broken, sum(suite["count"])),)
    return check(request, None if folder is None else _teacher(request, folder), more)


def check_lines(checks: Mapping[str, Any]) -> list[str]:
    """Return lines for the terminal: the verdict, and one for every raised flag."""
    seen = f"{len(checks['flags'])} checks on {checks['images']} images"
    head = f"{seen}: none speaks against these numbers"
    if checks["verdict"] != "ok":
        head = f"SUSPECT, {seen}: gradients are masked or misleading; the robustness numbers are not to be trusted"
    return [head, *(f"  {flag['name']}: {flag['text']}" for flag in checks["flags"] if flag["raised"])]


def _teacher(request: CheckRequest, folder: Path) -> nn.Module | None:
    """Return the very network that the run learned from; None if it had none, or its file is gone or has changed."""
    named = RunFolder(folder).read_config()["teacher"] if is_run(folder) else None
    if named is None:
        return None
    try:
        split, network = request.split, find_network(named["path"], dataset=request.split.name)
        known = Facts(model=named["model"], num_classes=len(split.classes), channels=split.shape[2])
        teacher, source = network.load(network.facts.or_else(known), split.shape, request.device, default_cache())
        if not same_network(named, source):
            raise DataError(f"{named['path']} is not the teacher any more that this run learned from")
        return teacher
    except (DataError, UsageError) as error:
        say(f"checks: no attack on the teacher: {error}")
        return None
