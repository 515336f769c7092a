"""The check of a network's robustness numbers: every flag, the numbers behind them, and a verdict.

`retemper evaluate NETWORK --check` writes it into evaluation.json; `check` is for a network of one's own.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retemper.console import say
from retemper.engine.attack import module_mode
from retemper.engine.checkpoints.find import find_network, same_network
from retemper.engine.checkpoints.header import Facts, is_run
from retemper.engine.device import exact_fp32, is_out_of_memory
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
        found += [flags.changes_images(model, batches[0])]
        safe = model if _can_be_attacked(model, batches[0]) else Attackable(model)
        with torch.no_grad():
            logits_NK = torch.cat([safe(image).float() for image in batches])
        found += [flags.random_outputs(safe, batches[0])]
        found += [flags.batch_dependent(safe, batches[0], logits_NK[: len(batches[0])])]
        request = replace(request, model=safe)
        probes, ladder = probe_gradients(request), climb(request, teacher)
    classes = logits_NK.shape[1]
    found += [flags.not_finite_logits(logits_NK, ladder), flags.near_chance(ladder, classes)]
    found += [flags.probabilities(logits_NK), flags.few_classes(classes), flags.logit_scale(logits_NK)]
    found += [flag(probes) for flag in flags.OF_GRADIENTS] + [flag(ladder) for flag in flags.OF_LADDER] + [*more]
    checks = {
        "verdict": "suspect" if any(flag.raised and flag.name not in flags.ADVICE for flag in found) else "ok",
        "flags": [asdict(flag) for flag in found],
        "ladder": _accuracies(ladder) | {"gradients": probes},
        "images": len(request.indices),
        "seconds": time.monotonic() - started,
    }
    return finite(checks)


class Attackable(nn.Module):
    """A network that attacks by gradients fail on, made so that they run.

    It is given copies of the images, and its answers depend on the images by a gradient of zero where they have none.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, C, H, W) pixels to (B, K) logits."""
        logits_BK = self.network(image.clone())
        return logits_BK + 0 * image.flatten(1).sum(1, keepdim=True) if image.requires_grad else logits_BK


def _can_be_attacked(model: nn.Module, image: Tensor) -> bool:
    """Say whether gradients with respect to (B, C, H, W) images can be taken, and the network leaves them alone."""
    given = image.clone().requires_grad_(True)
    try:
        with torch.enable_grad():
            logits_BK: Tensor = model(given)
            torch.autograd.grad(logits_BK.sum(), given)
    except RuntimeError as error:  # torch's, for what cannot be differentiated
        if is_out_of_memory(error):
            raise
        return False
    return bool(torch.equal(given, image))


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
    unknown = [flag["name"] for flag in checks["flags"] if flag["value"] is None]
    seen = f"{len(checks['flags']) - len(unknown)} checks on {checks['images']} images"
    seen += f" (not measured: {', '.join(unknown)})" if unknown else ""
    head = f"{seen}: none speaks against these numbers"
    if checks["verdict"] != "ok":
        why = "gradients are masked or misleading, or the answers are none to test"
        head = f"SUSPECT, {seen}: {why}; the robustness numbers are not to be trusted"
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
