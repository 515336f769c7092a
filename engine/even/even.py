"""`retemper even`: a trained network, evened, as a run of its own.

What is written is evaluated, reported, compared and exported as any run; its config.json says which network it was made
of, how, and by which images it was chosen. Of the ways without training nothing is written before all is computed.
"""

import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from retemper.console import say
from retemper.engine.checkpoints.header import Facts, find_weights, load_network, read_facts
from retemper.engine.device import cpu_threads, device_name
from retemper.engine.even.free import Candidate, candidates, put_into
from retemper.engine.even.head import find_head
from retemper.engine.even.subject import FINE_TUNES, EvenRequest, Subject, subject
from retemper.engine.even.table import as_text
from retemper.engine.models import NormalisingNetwork, one_side
from retemper.engine.predict import as_float
from retemper.engine.run.commands import absolute
from retemper.engine.run.job import Job, default_cache
from retemper.engine.run.run_folder import RunFolder
from retemper.engine.run.teachers import with_teacher
from retemper.engine.run.train import train
from retemper.errors import UsageError
from retemper.files import finite
from retemper.interrupts import undisturbed
from retemper.provenance import commit, versions

NOT_OF_IT = ("method", "optim")  # the groups of a recipe that say nothing of what was not trained


def even(request: EvenRequest) -> tuple[Path, str]:
    """Even a network; return the folder of the new run, and a table of before and after by class.

    Raises:
        UsageError, DataError: the network, its images or the folder cannot be used; or a class was never learned.
    """
    if request.weights != "best" and Path(request.target).is_file():
        raise UsageError(
            f"--weights {request.weights} chooses among a run's: {request.target} is one file, leave it out"
        )
    if request.out is not None:
        RunFolder(request.out).require_place()
    one = subject(request)
    if request.by in FINE_TUNES:
        return _tuned(one, request.by)
    started = time.monotonic()
    with cpu_threads(one.found.recipe.execution.cpu_threads):
        head = find_head(one.model, as_float(one.images.held, torch.arange(2), request.device), one.name)
        tried = candidates(one, head)
        best = max(tried, key=lambda candidate: candidate.score)
        if best.score <= one.before["average"] + one.before["worst"]:
            say(f"note: on the images that choose, {one.name} as it is has no smaller average + worst class")
        put_into(head, best.weight_KD, best.bias_K)
        out = one.out(best.by)
        _write(one, best, tried, RunFolder(out), time.monotonic() - started)
    return out, as_text(one, {candidate.by: candidate.report for candidate in tried}, best.by)


def _tuned(one: Subject, by: str) -> tuple[Path, str]:
    """Fine-tune the network as a training run that begins with it."""
    request, network = one.request, one.known.network
    start = network.name if request.weights == "best" else network.weights
    job = Job(
        method=one.method,
        setting=one.found.setting,
        recipe=one.found.recipe,
        out=one.out(by),
        seed=one.seed,
        data_root=one.known.data_root,
        start=start,
        cache=default_cache(),
        device=request.device,
    )
    out = train(with_teacher(job))
    weights = find_weights(out)
    report = one.judged(load_network(weights, read_facts(weights), request.device))
    return out, as_text(one, {by: report}, by)


def _write(one: Subject, best: Candidate, tried: list[Candidate], folder: RunFolder, seconds: float) -> None:
    """Write the run of the best candidate, which the network holds now."""
    recipe, facts = one.found.recipe, one.known.facts
    method = f"even_{best.by}"
    told = Facts(
        model=facts.model,
        num_classes=len(one.split.classes),
        channels=one.split.shape[2],
        image_size=recipe.data.image_size,
        max_side=recipe.data.max_side,
        dataset=recipe.data.dataset,
        eps=recipe.attack.eps,
        side=one_side(str(facts.model), one.split.shape[0]),
        source=facts.source,
    )
    own = one.model.pixels() if isinstance(one.model, NormalisingNetwork) else {}  # that its file may have set
    header = told.as_metadata() | {"method": method, "setting": one.stem, "score": repr(best.score)}
    header |= {"epoch": str(best.chosen_round + 1)}
    with folder.locked(), undisturbed():
        folder.begin(_config(one, best, tried, method, folder.path))
        folder.save_weights(folder.best, one.model.state_dict() | own, header)
        folder.save_weights(folder.last, one.model.state_dict() | own, header)
        folder.save_metrics(_lines(best, seconds))


def _config(one: Subject, best: Candidate, tried: list[Candidate], method: str, out: Path) -> dict[str, Any]:
    """Return what config.json holds."""
    recipe = {group: options for group, options in one.found.recipe.grouped().items() if group not in NOT_OF_IT}
    count = one.found.recipe.selection.holdout_per_class
    return {
        "method": method,
        "setting": one.stem,
        "recipe": recipe,
        "seed": one.seed,
        "classes": list(one.split.classes),
        "channels": one.split.shape[2],
        "out": absolute(out),
        "data_root": absolute(one.known.data_root),
        "teacher": None,
        "clean_teacher": None,
        "start": one.source | {"path": str(absolute(one.source["path"]))},
        "evened": {
            "by": best.by,
            "weights": one.request.weights,
            "chosen_on": f"{count} training images of each class",
            "held_out_of_its_training": one.found.is_apart,
            "before": _summary(one.before),
            "tried": {candidate.by: _summary(candidate.report) for candidate in tried},
        },
        "student_source": one.known.facts.source,
        "versions": versions(),
        "device": device_name(one.request.device),
        "processes": 1,
        "commit": commit(),
        "started": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _summary(report: dict[str, Any]) -> dict[str, Any]:
    return {name: report[name] for name in ("accuracy", "average", "worst", "nsd")}


def _lines(best: Candidate, seconds: float) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl: the rounds of a fit, or one; the chosen one has what was held out."""
    norm_K = best.weight_KD.double().norm(dim=1).tolist()
    rounds: list[dict[str, Any]] = [
        {"class_accuracy": one.accuracy_K.tolist(), "bias": one.shift_K.tolist()} for one in best.rounds
    ] or [{"row_norm": norm_K}]
    share = seconds / len(rounds)
    lines = [{"epoch": number, "seconds": share, **one} for number, one in enumerate(rounds, 1)]
    lines[best.chosen_round]["holdout"] = best.report
    return finite(lines)
