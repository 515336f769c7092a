"""Does ABSLD even the classes out? The demo over several seeds: a teacher, RSLAD and ABSLD on digits, by class.

    python benchmarks/digits.py --seeds 3 --out runs/digits --json benchmarks/results/digits.json

Every seed trains its own teacher. Runs already finished under --out are not repeated. Prints a table, mean and range
over the seeds; writes all figures to --json.
"""

import json
from pathlib import Path
from typing import Any

from runs import DEVICE
from summary import markdown, mean_and_range, words_of, write_summary

from retemper.engine.demo import run_demo
from retemper.engine.run.run_folder import RunFolder

RUNS = ("teacher", "rslad", "absld")
MEASURES = ("average", "worst", "nsd")


def measure(out: Path) -> dict[str, Any]:
    """Return the numbers of one seed's three runs, by attack and measure, and their seconds of training."""
    found = {}
    for name in RUNS:
        attacks = json.loads((out / name / "evaluation.json").read_text())["attacks"]
        lines = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        found[name] = {attack: {key: result[key] for key in MEASURES} for attack, result in attacks.items()}
        found[name]["seconds"] = sum(line["seconds"] for line in lines)
    return found


def table(seeds: list[dict[str, Any]]) -> str:
    """Return a Markdown table of means and ranges over the seeds, a row a run."""

    def cell(name: str, attack: str, key: str) -> str:
        return mean_and_range([seed[name][attack][key] for seed in seeds], ".3f" if key == "nsd" else ".1%")

    head = ["", "clean", "PGD-20 average", "PGD-20 worst class", "PGD-20 NSD"]
    return markdown(
        head,
        [[name, cell(name, "clean", "average"), *(cell(name, "pgd20", key) for key in MEASURES)] for name in RUNS],
    )


def main() -> None:
    parser = words_of(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    seeds = []
    for seed in range(words.seeds):
        run_demo(words.out / f"seed{seed}", seed)
        seeds.append(measure(words.out / f"seed{seed}"))
    print(table(seeds))
    recipe = RunFolder(words.out / "seed0/absld").read_config()["recipe"]
    write_summary(words.json, {"seeds": seeds, "recipe": recipe}, DEVICE)


if __name__ == "__main__":
    main()
