"""Does ABSLD even the classes out? The demo over several seeds: a teacher, RSLAD and ABSLD on digits, by class.

    python benchmarks/digits.py --seeds 3 --out runs/digits --json benchmarks/results/digits.json

Every seed trains its own teacher. Runs already finished under --out are not repeated. Prints the README's table.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from retemper.engine.demo import run_demo
from retemper.files import write_json
from retemper.provenance import commit, versions

RUNS = ("teacher", "rslad", "absld")
MEASURES = ("average", "worst", "nsd")


def measure(out: Path) -> dict[str, Any]:
    """The numbers of one seed's three runs: attack -> measure, and the seconds of training."""
    found = {}
    for name in RUNS:
        attacks = json.loads((out / name / "evaluation.json").read_text())["attacks"]
        lines = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        found[name] = {attack: {key: result[key] for key in MEASURES} for attack, result in attacks.items()}
        found[name]["seconds"] = sum(line["seconds"] for line in lines)
    return found


def table(seeds: list[dict[str, Any]]) -> str:
    """Mean and range over the seeds, a row a run."""

    def cell(name: str, attack: str, key: str) -> str:
        values = [seed[name][attack][key] for seed in seeds]
        form = "{:.3f}" if key == "nsd" else "{:.1%}"
        return f"{form} ({form} to {form})".format(statistics.mean(values), min(values), max(values))

    rows = ["| | clean | PGD-20 average | PGD-20 worst class | PGD-20 NSD |", "|---|---|---|---|---|"]
    for name in RUNS:
        cells = [cell(name, "clean", "average"), *(cell(name, "pgd20", key) for key in MEASURES)]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="ABSLD against RSLAD on digits, over seeds.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    seeds = []
    for seed in range(words.seeds):
        run_demo(words.out / f"seed{seed}", seed)
        seeds.append(measure(words.out / f"seed{seed}"))
    print(table(seeds))
    if words.json:
        config = json.loads((words.out / "seed0/absld/config.json").read_text())
        content = {
            "seeds": seeds,
            "recipe": config["recipe"],
            "versions": versions(),
            "commit": commit(),
            "device": config["device"],
        }
        words.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(words.json, content)


if __name__ == "__main__":
    main()
