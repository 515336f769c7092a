"""Methods trained and evaluated under one protocol, run by run; what is finished is not repeated."""

import argparse
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from retemper.console import Progress, say
from retemper.engine.catalogue import find_setting, method_module, methods
from retemper.engine.checkpoints.header import Facts
from retemper.engine.evaluation.evaluate import EvaluationRequest, evaluate_target
from retemper.engine.run.job import Job, default_cache, default_out
from retemper.engine.run.run_folder import RunFolder
from retemper.engine.run.teachers import with_teacher
from retemper.engine.run.train import train
from retemper.errors import Busy
from retemper.files import locked
from retemper.loaders import usual_eps

PAUSE_S = 15.0  # until a process looks again at what others do
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The protocol under which each run is evaluated.

    Attributes:
        out: the folder in which the runs' folders lie.
        attacks: "clean", "pgd20", "autoattack".
        autoattack_limit: how many test images AutoAttack is given; None for all.
        fold: attack the folded network, which computes the same with fewer operations.
        suite: of AutoAttack's attacks, "standard" or "fast".
        check: look for masked gradients, too.
        options: of the recipes that are otherwise than in the setting, by flat name.
        name: what tells a folder of runs with such options from others; it ends their names.
        variant: of the methods; None for each setting's own, as a teacher or a start that is trained first has it.
        preset: "paper" or "strong"; teachers and starts that are trained first are as in their papers.
        epochs: in place of each setting's own; None for those.
        data_root: the folder of the data set; None for digits, and for Fashion-MNIST where Debian puts it.
    """

    out: Path
    attacks: tuple[str, ...]
    autoattack_limit: int | None = None
    fold: bool = False
    suite: str = "standard"
    check: bool = False
    variant: str | None = None
    preset: str = "paper"
    epochs: int | None = None
    data_root: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""


def settings_on(data: str) -> dict[str, str]:
    """Return METHOD:SETTING of every method on `data`, by its name in a table.

    SAT and TRADES are taken in the setting of the students' architecture. A setting DATA_VARIANT stands beside DATA as
    "METHOD, VARIANT".
    """
    found = {}
    for method in methods():
        settings = method_module(method).SETTINGS
        for name in settings:
            as_student = f"{data}_student" in settings
            if name == (f"{data}_student" if as_student else data):
                found[method] = f"{method}:{name}"
            elif name.startswith(f"{data}_") and not name.endswith(("_student", "_clean", "_small", "_resnet18")):
                found[f"{method}, {name.removeprefix(f'{data}_')}"] = f"{method}:{name}"
    return found


def require_methods(parser: argparse.ArgumentParser, data: str, methods: str) -> dict[str, str]:
    """Return METHOD:SETTING on `data` of the methods in --methods, or end with an error in one line."""
    known = settings_on(data)
    if unknown := [name for name in methods.split(",") if name not in known]:
        parser.error(f"--methods {','.join(unknown)}: on {data} there are {', '.join(known) or 'none'}")
    return {name: known[name] for name in methods.split(",")}


def folder_of(name: str, seed: int, out: Path, preset: str = "paper") -> Path:
    """Return the folder of the run of METHOD:SETTING."""
    method, setting, _ = find_setting(name)
    return out / default_out(method, setting, seed, preset).name


def commits(runs: Iterable[Path]) -> list[str]:
    """Return the commits of the code that trained the runs, each once."""
    return sorted({str(RunFolder(run).read_config()["commit"]) for run in runs})


def share_out(title: str, units: Mapping[str, Callable[[], object]], out: Path) -> None:
    """Do all units of work; where the same command runs in several processes, each does what no other is at.

    A process comes back to what another was at, and waits for it in the end: the other may have been stopped.

    Args:
        title: of the progress bar.
        units: what to do, by name; it repeats nothing that is finished.
        out: the folder of the runs, which holds a lock a unit.
    """
    waiting, told = dict(units), set[str]()
    with Progress(title, len(units)) as progress:
        while waiting:
            for name, work in list(waiting.items()):
                try:
                    with locked(out / f".{re.sub('[^a-z0-9_]+', '-', name)}.lock", f"{name}: another process is at it"):
                        say(name)
                        work()
                except Busy as busy:
                    if name not in told:
                        say(str(busy))
                    told.add(name)
                    continue
                del waiting[name]
                progress.advance(1)
            if waiting:
                time.sleep(PAUSE_S)


def trained_and_evaluated(name: str, seed: int, protocol: Protocol) -> dict[str, Any]:
    """Train and evaluate METHOD:SETTING where that is not done.

    Returns:
        The content of evaluation.json, and "seconds" of training.
    """
    method, setting, found = find_setting(name)
    out, cache = folder_of(name, seed, protocol.out, protocol.preset), default_cache()
    recipe = found.recipe if protocol.epochs is None else found.recipe.replace(epochs=protocol.epochs)
    if protocol.variant is not None:  # in a folder of its own, beside that of a start of the same setting
        recipe, out = recipe.as_variant(protocol.variant), out.with_name(f"{out.name}-{protocol.variant}")
    recipe = recipe.named_in({"preset": protocol.preset})
    recipe, out = recipe.replace(**protocol.options), out.with_name(out.name + protocol.name)
    where: dict[str, Any] = dict(cache=cache, device=DEVICE, data_root=protocol.data_root)
    job = Job(method=method, setting=setting, recipe=recipe, out=out, seed=seed, **where)
    train(with_teacher(job))
    content = evaluated(out, protocol)
    lines = [json.loads(line) for line in RunFolder(out).metrics.read_text().splitlines()]
    return content | {"seconds": sum(line["seconds"] for line in lines)}


def evaluated(run: Path, protocol: Protocol) -> dict[str, Any]:
    """Evaluate a finished run where that is not done; return the content of evaluation.json."""
    folder = RunFolder(run)
    content = json.loads(folder.evaluation.read_text()) if folder.evaluation.exists() else {"attacks": {}}
    if content["attacks"] and content["protocol"]["eps"] != usual_eps(content["protocol"]["dataset"]):
        content = {"attacks": {}}  # it stays, beside the new one
    # AutoAttack's ledger knows whether it was run under this protocol, and then has nothing left to do
    missing = tuple(name for name in protocol.attacks if name == "autoattack" or name not in _done(content))
    for _ in range(2):  # an evaluation of other versions or weights is put aside, and what it had is missing again
        if not missing and (not protocol.check or "checks" in content):
            break
        request = EvaluationRequest(
            target=run,
            attacks=missing,
            device=DEVICE,
            facts=Facts(),
            data_root=protocol.data_root,
            autoattack_limit=protocol.autoattack_limit,
            fold=protocol.fold,
            suite=protocol.suite,
            check=protocol.check and "checks" not in content,
        )
        content = evaluate_target(request)[1]
        missing = tuple(name for name in protocol.attacks if _entry(name, protocol) not in _done(content))
    return content


def _done(content: dict[str, Any]) -> set[str]:
    """Return the attacks of an evaluation that were finished."""
    return {attack for attack, entry in content["attacks"].items() if entry.get("complete", True)}


def _entry(attack: str, protocol: Protocol) -> str:
    """Return the name of an attack in evaluation.json."""
    return "autoattack-fast" if (attack, protocol.suite) == ("autoattack", "fast") else attack
