"""How do the methods compare when teacher, schedule, selection and evaluation are the same for all?

    python benchmarks/methods.py --data digits --seeds 3 --json benchmarks/results/methods_digits.json

All students are the same small ResNet; the distillation methods share one robust teacher (and one clean one), the
fine-tuning ones begin with one SAT student. What is finished under --out is not repeated. Prints a table: means over
the seeds, and the range for the worst class.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from retemper.engine.catalogue import find_setting, method_module, methods
from retemper.engine.evaluation.evaluate_run import EvaluationRequest, evaluate_target
from retemper.engine.job import Job, default_cache, default_out
from retemper.engine.run_folder import RunFolder, commit, device_name, versions
from retemper.engine.teacher import with_teacher
from retemper.engine.train import train
from retemper.engine.trained import Facts
from retemper.engine.weights import write_atomically
from retemper.loaders.progress import Progress, say

ATTACKS = ("clean", "pgd20")


def contestants(data: str) -> dict[str, str]:
    """Every method on `data`, by the name it has in the table; SAT and TRADES with the students' architecture."""
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


def measured(name: str, out: Path, seed: int) -> dict[str, Any]:
    """Train and evaluate METHOD:SETTING under `out`, unless that is done; its figures."""
    method, setting, found = find_setting(name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = out / default_out(method, setting, seed).name
    job = Job(
        method=method,
        setting=setting,
        recipe=found.recipe,
        out=folder,
        seed=seed,
        cache=default_cache(),
        device=device,
    )
    train(with_teacher(job))
    path = RunFolder(folder).evaluation
    attacks = json.loads(path.read_text())["attacks"] if path.exists() else {}
    if not attacks.keys() >= set(ATTACKS):
        request = EvaluationRequest(target=folder, attacks=ATTACKS, device=device, facts=Facts())
        attacks = evaluate_target(request)[1]["attacks"]
    lines = [json.loads(line) for line in RunFolder(folder).metrics.read_text().splitlines()]
    figures = {attack: {key: attacks[attack][key] for key in ("average", "worst", "nsd")} for attack in ATTACKS}
    return {**figures, "seconds": sum(line["seconds"] for line in lines)}


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """A line a method, the fairest first."""

    def mean(name: str, attack: str, key: str) -> float:
        return statistics.mean(one[attack][key] for one in rows[name])

    lines = [
        "| method | clean | PGD-20 average | worst class | NSD | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(rows, key=lambda name: -mean(name, "pgd20", "worst")):
        worst = [one["pgd20"]["worst"] for one in rows[name]]
        spread = f"{statistics.mean(worst):.1%} ({min(worst):.1%} to {max(worst):.1%})"
        seconds = statistics.mean(one["seconds"] for one in rows[name])
        lines.append(
            f"| {name} | {mean(name, 'clean', 'average'):.1%} | {mean(name, 'pgd20', 'average'):.1%} | {spread} "
            f"| {mean(name, 'pgd20', 'nsd'):.3f} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Every method under one protocol.")
    parser.add_argument("--data", default="digits", choices=("digits",))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help="methods, separated by commas")
    words = parser.parse_args()
    chosen = contestants(words.data)
    if words.only:
        chosen = {name: chosen[name] for name in words.only.split(",")}
    rows: dict[str, list[dict[str, Any]]] = {}
    with Progress("methods", len(chosen) * words.seeds) as progress:
        for seed in range(words.seeds):
            for name, setting in chosen.items():
                say(f"{setting}, seed {seed}")
                rows.setdefault(name, []).append(measured(setting, words.out, seed))
                progress.advance(1)
    teacher = measured(f"sat:{words.data}", words.out, 0)
    print(table({"the teacher (SAT, twice as wide)": [teacher], **rows}))
    if words.json:
        content = {
            "seeds": words.seeds,
            "rows": rows,
            "teacher": teacher,
            "versions": versions(),
            "commit": commit(),
            "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        }
        words.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(words.json, json.dumps(content, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
