"""How do the methods compare when teacher, schedule, selection and evaluation are the same for all?

    python benchmarks/methods.py --data digits --seeds 3 --json benchmarks/results/methods_digits.json
    python benchmarks/methods.py --data digits --seeds 3 --variant released
    python benchmarks/methods.py --data digits --seeds 3 --preset strong

All students are the same small ResNet; the distillation methods share one robust teacher (and one clean one), the
fine-tuning ones begin with one student of SAT, or of TRADES. What is finished under --out is not repeated. Prints a
table: means over the seeds, and the range for the worst class; writes all figures to --json.
"""

import statistics
from pathlib import Path
from typing import Any

from runs import DEVICE, Protocol, settings_on, trained_and_evaluated
from summary import common_radius, markdown, mean_and_range, words_of, write_summary

from retemper.console import Progress, say
from retemper.engine.catalogue import find_setting

ATTACKS = ("clean", "pgd20")


def measured(name: str, seed: int, protocol: Protocol) -> dict[str, Any]:
    """Return the figures of METHOD:SETTING, trained and evaluated unless that is done."""
    content = trained_and_evaluated(name, seed, protocol)
    attacks = content["attacks"]
    figures = {attack: {key: attacks[attack][key] for key in ("average", "worst", "nsd")} for attack in ATTACKS}
    return {
        **figures,
        "protocol": {key: content["protocol"][key] for key in ("eps", "network")},
        "seconds": content["seconds"],
    }


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Return a Markdown table with a line a method, the best worst class first."""

    def mean(name: str, attack: str, key: str) -> float:
        return statistics.mean(one[attack][key] for one in rows[name])

    radius = common_radius(one for seeds in rows.values() for one in seeds)
    head = ["method", "clean", f"PGD-20 average, eps {radius}", "worst class", "NSD"]
    lines = [
        [
            name,
            f"{mean(name, 'clean', 'average'):.1%}",
            f"{mean(name, 'pgd20', 'average'):.1%}",
            mean_and_range([one["pgd20"]["worst"] for one in rows[name]]),
            f"{mean(name, 'pgd20', 'nsd'):.3f}",
        ]
        for name in sorted(rows, key=lambda name: -mean(name, "pgd20", "worst"))
    ]
    return markdown(head, lines)


def main() -> None:
    parser = words_of(__doc__)
    parser.add_argument("--data", default="digits", choices=("digits",))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help="methods, separated by commas")
    parser.add_argument("--variant", help="of the methods that have it, in folders named after it")
    parser.add_argument("--preset", choices=("paper", "strong"), default="paper", help="how strongly all are trained")
    words = parser.parse_args()
    protocol = Protocol(out=words.out, attacks=ATTACKS, variant=words.variant, preset=words.preset)
    chosen = settings_on(words.data)
    if words.only:
        chosen = {name: chosen[name] for name in words.only.split(",")}
    if words.variant:
        having = {name: find_setting(setting)[2].recipe.method.variants for name, setting in chosen.items()}
        chosen = {name: setting for name, setting in chosen.items() if words.variant in having[name]}
    rows: dict[str, list[dict[str, Any]]] = {}
    with Progress("methods", len(chosen) * words.seeds) as progress:
        for seed in range(words.seeds):
            for name, setting in chosen.items():
                say(f"{setting}, seed {seed}")
                rows.setdefault(name, []).append(measured(setting, seed, protocol))
                progress.advance(1)
    teacher = measured(f"sat:{words.data}", 0, Protocol(out=words.out, attacks=ATTACKS))
    print(table({"the teacher (SAT, twice as wide)": [teacher], **rows}))
    write_summary(words.json, {"seeds": words.seeds, "preset": words.preset, "rows": rows, "teacher": teacher}, DEVICE)


if __name__ == "__main__":
    main()
