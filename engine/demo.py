"""The demo: a robust teacher and two students on real digits, compared by class, in three minutes on two cores."""

import time
from pathlib import Path

import torch

from retemper.console import say
from retemper.engine.catalogue import find_setting
from retemper.engine.checkpoints.header import Facts
from retemper.engine.evaluation.evaluate import EvaluationRequest, evaluate_target
from retemper.engine.evaluation.summary import summary
from retemper.engine.report import require_plots, write_report
from retemper.engine.run.job import Job, default_cache
from retemper.engine.run.train import train

CAST = {"teacher": "sat:digits", "rslad": "rslad:digits", "absld": "absld:digits"}
ATTACKS = ("clean", "fgsm", "pgd20", "cw")


def run_demo(out: str | Path, seed: int = 0) -> Path:
    """Train, evaluate and report, going on with what an earlier demo left in `out`; return the page."""
    started, out = time.monotonic(), Path(out)
    require_plots()  # now, not after two minutes of training
    for name, recipe in CAST.items():
        method, setting, found = find_setting(recipe)
        job = Job(
            method=method,
            setting=setting,
            recipe=found.recipe,
            out=out / name,
            seed=seed,
            teacher=None if name == "teacher" else out / "teacher",
            cache=default_cache(),
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        )
        train(job)
        _, content = evaluate_target(
            EvaluationRequest(target=out / name, attacks=ATTACKS, device=job.device, facts=Facts())
        )
        say(f"\n{name}\n{summary(content)}\n")
    page = write_report([out / name for name in CAST], out)
    say(f"demo: {time.monotonic() - started:.0f} s; open {page} in a browser")
    return page
