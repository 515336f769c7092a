"""What does distillation gain, and what does it lose, with an attack of one, two or three steps in place of ten?

    python benchmarks/one_step.py --data digits --seeds 3
    python benchmarks/one_step.py --data fashion_mnist_small --seeds 3 --methods rslad,absld
    python benchmarks/one_step.py --data digits --seeds 1 --epochs 2 --attacks ten,nfgsm --results /tmp/x   a try

Trains each method with each attack under --out, and evaluates it: clean and PGD-20 on all test images, AutoAttack on a
class-balanced subset. What is finished is not repeated, and the same command in a second process takes the runs that
the first is not at. Then it times the steps: in one process, at the setting's batch
and with the teacher's answers known, a few steps of each attack in turn, so that all see the same machine. On digits it
also makes one-step training collapse on purpose, with the guard and with a guard that only looks on.

Writes to --results a table a question (accuracy.md, seconds.md, guard.md), all figures as one_step.json, and the runs'
records.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from records import RECORDS, pack
from runs import DEVICE, Protocol, commits, folder_of, settings_on, share_out, trained_and_evaluated
from summary import common_radius, markdown, mean_and_range, words_of, write_summary

from retemper.cli import reported
from retemper.engine import State, create_model, train_step
from retemper.engine.catalogue import find_setting
from retemper.engine.kept import Kept
from retemper.engine.models import channels_last
from retemper.files import locked, read_json_lines, write_atomically
from retemper.kernels import identity_view

TEN = "ten"
ATTACKS: dict[str, dict[str, Any]] = {  # the first is what the others are held against: the method's own ten steps
    TEN: {},
    "pgd3": dict(attack="pgd3"),
    "pgd2": dict(attack="pgd2"),
    "nfgsm": dict(attack="nfgsm"),
    "pgi": dict(attack="pgi"),
    "pgi, weight 0": dict(attack="pgi", pgi_weight=0.0),
}
EVALUATED = ("clean", "pgd20", "autoattack")
KEPT = ("config.json", "metrics.jsonl", "evaluation.json", "evaluation.csv")
RESULTS = Path("benchmarks/results/one_step")
FAR: dict[str, Any] = dict(  # FGSM without noise, in a ball twice as wide as the digits' usual one
    eps=0.3, attack_steps=1, attack_step=0.3, attack_start="none", guard="on", epochs=30, lr_drops=(25, 28)
)
LOOKS_ON = dict(guard_share=0.0)


def folder_name(attack: str) -> str:
    """Return what ends the names of the folders of runs with that attack."""
    return "-" + attack.replace(", ", "-").replace(" ", "")


def trained(words: argparse.Namespace, method: str, attack: str, seed: int) -> tuple[Path, dict[str, Any]]:
    """Return the run of a method with an attack, and its evaluation; trained and evaluated where that is not done."""
    options = ATTACKS[attack] | ({} if words.epochs is None else dict(epochs=words.epochs))
    protocol = Protocol(
        out=words.out,
        attacks=EVALUATED,
        autoattack_limit=words.autoattack_images,
        fold=True,
        options=options,
        name=folder_name(attack) + ("" if words.epochs is None else f"-{words.epochs}epochs"),
    )
    setting = settings_on(words.data)[method]
    found = trained_and_evaluated(setting, seed, protocol)
    folder = folder_of(setting, seed, words.out)
    return folder.with_name(folder.name + protocol.name), found


def accuracy_table(found: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """Return a Markdown table with a line for each method and attack: means and ranges over the seeds."""
    radius = common_radius(one for seeds in found.values() for one in seeds)
    head = ["method, attack", "clean", f"AutoAttack average, eps {radius}", "worst class", "PGD-20 average", "NSD"]
    head += ["seconds of training", "fell back"]
    rows = []
    for (method, attack), seeds in found.items():
        values = {key: [one["attacks"]["autoattack"][key] for one in seeds] for key in ("average", "worst", "nsd")}
        others = [[one["attacks"][name]["average"] for one in seeds] for name in ("clean", "pgd20")]
        rows.append(
            [
                f"{method}, {attack}",
                mean_and_range(others[0]),
                mean_and_range(values["average"]),
                mean_and_range(values["worst"]),
                mean_and_range(others[1]),
                mean_and_range(values["nsd"], ".3f"),
                f"{statistics.mean(one['seconds'] for one in seeds):,.0f}",
                f"{sum(bool(one['fell_back']) for one in seeds)} of {len(seeds)}",
            ]
        )
    return markdown(head, rows)


def fallbacks(folder: Path) -> list[dict[str, Any]]:
    """Return what the guard saw in each epoch after which it took more steps, with the epoch."""
    rows = read_json_lines(folder / "metrics.jsonl", dict)[0]
    seen = [row["guard"] | {"epoch": row["epoch"]} for row in rows if row.get("guard")]
    return [one for one in seen if one["next"] != one["attack"]]


class Stepping:
    """A student that takes steps of one attack, to be timed. The teacher's answers are known, as in a run."""

    def __init__(self, setting: str, options: dict[str, Any]) -> None:
        self.recipe = recipe = find_setting(setting)[2].recipe.replace(**options)
        torch.manual_seed(0)
        sizes = {"digits": (8, 10), "fashion-mnist": (recipe.data.image_size or 28, 10)}
        side, classes = sizes[recipe.data.dataset]
        batch = recipe.optim.batch_size
        student = create_model(recipe.networks.student, classes)
        teacher = create_model(recipe.networks.teacher_model or recipe.networks.student, classes)
        teacher = channels_last(teacher, DEVICE).eval().requires_grad_(False)
        self.state = State(recipe, student, teacher if recipe.networks.teacher_model else None, classes, DEVICE)
        if recipe.attack.kind == "pgi":
            shape, padding = (side, side, 1), recipe.data.padding
            self.state.prior = Kept(batch, shape, padding, eps=recipe.attack.eps, reset=40, rows=batch, device=DEVICE)
        self.state.start_epoch(recipe, 1, 0)
        image = torch.rand(batch, 1, side, side, device=DEVICE).to(memory_format=torch.channels_last)
        self.given = (image, torch.arange(batch, device=DEVICE) % classes)
        self.known = torch.randn(batch, classes, device=DEVICE) if self.state.teacher is not None else None
        view = torch.full((batch,), identity_view(recipe.data.padding), device=DEVICE)
        self.seen = torch.arange(batch, device=DEVICE), view

    def seconds(self, steps: int) -> float:
        """Return the seconds of a step, over so many."""
        begun = time.perf_counter()
        losses = [train_step(self.state, self.recipe, *self.given, self.known, *self.seen) for _ in range(steps)]
        losses[-1].item()  # the device has done all of them then
        return (time.perf_counter() - begun) / steps


def timed(setting: str, attacks: list[str], rounds: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """Return, by attack, the seconds of a step in each round, and how many times as long ten steps take there."""
    all_of_them = {attack: Stepping(setting, ATTACKS[attack]) for attack in dict.fromkeys([TEN, *attacks])}
    for one in all_of_them.values():
        one.seconds(2)  # allocates, and makes the optimizer's state
    seconds: dict[str, list[float]] = {attack: [] for attack in all_of_them}
    for _ in range(rounds):
        for attack, one in all_of_them.items():
            seconds[attack].append(one.seconds(steps))
    return {
        attack: {"seconds": own, "times": [ten / one for ten, one in zip(seconds[TEN], own, strict=True)]}
        for attack, own in seconds.items()
    }


def seconds_table(found: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    """Return a Markdown table of seconds a step; the ratio is the median of the rounds, with its lowest and highest."""
    rows = [
        [
            f"{method}, {attack}",
            f"{1000 * statistics.median(one['seconds']):.1f} ms",
            f"{statistics.median(one['times']):.2f} ({min(one['times']):.2f} to {max(one['times']):.2f})",
        ]
        for method, of_method in found.items()
        for attack, one in of_method.items()
    ]
    return markdown(["method, attack", "a step", "times as fast as its ten steps"], rows)


def all_trained(words: argparse.Namespace) -> tuple[dict[tuple[str, str], list[dict[str, Any]]], list[Path]]:
    """Return the evaluations of each method and attack, seed by seed, and the runs' folders."""
    made: dict[tuple[str, str, int], tuple[Path, dict[str, Any]]] = {}

    def make(method: str, attack: str, seed: int) -> None:
        folder, evaluation = trained(words, method, attack, seed)
        made[method, attack, seed] = folder, evaluation | {"fell_back": fallbacks(folder)}

    pairs = [(method, attack) for method in words.methods for attack in words.attacks]
    asked = [(method, attack, seed) for seed in range(words.seeds) for method, attack in pairs]
    units = {f"{method}, {attack}, seed {seed}": partial(make, method, attack, seed) for method, attack, seed in asked}
    share_out("one step", units, words.out)
    found = {pair: [made[(*pair, seed)][1] for seed in range(words.seeds)] for pair in pairs}
    return found, [made[one][0] for one in asked]


def collapses(words: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what a collapse made on purpose looks like in each seed, with the guard and with one that looks on."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    kinds = {"a guard": {}, "a guard that only looks on": LOOKS_ON}

    def collapse(name: str, seed: int) -> None:
        found[name, seed] = {"with": name, "seed": seed} | collapsed(words, kinds[name], seed)

    asked = [(name, seed) for name in kinds for seed in range(words.seeds)]
    share_out("collapses", {f"{name}, seed {seed}": partial(collapse, name, seed) for name, seed in asked}, words.out)
    return [found[one] for one in asked]


def collapsed(words: argparse.Namespace, kind: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return what the guard saw of one collapse, epoch by epoch, and what it did."""
    options = FAR | dict(kind) | ({} if words.epochs is None else dict(epochs=words.epochs))
    ending = f"-far{'-looks-on' if 'guard_share' in options else ''}"
    ending += "" if words.epochs is None else f"-{words.epochs}epochs"
    trained_and_evaluated("sat:digits_student", seed, Protocol(out=words.out, attacks=(), options=options, name=ending))
    folder = folder_of("sat:digits_student", seed, words.out)
    folder = folder.with_name(folder.name + ending)
    rows = [row["guard"] for row in read_json_lines(folder / "metrics.jsonl", dict)[0] if row.get("guard")]
    return {"epochs": rows, "fallbacks": fallbacks(folder)}


def guard_table(found: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the collapses: what was seen when it was caught, and at the end."""
    rows = []
    for one in found:
        caught = "; ".join(
            f"after epoch {seen['epoch']}: {seen['own']:.0%} under {seen['attack']}, {seen['pgd10']:.0%} under ten, "
            f"so {seen['next']}"
            for seen in one["fallbacks"]
        )
        last = one["epochs"][-1]
        ends = f"{last['own']:.0%} under {last['attack']}, {last['pgd10']:.0%} under ten steps"
        rows.append([f"{one['with']}, seed {one['seed']}", caught or "nothing done", ends])
    return markdown(["FGSM without noise, eps 0.3, digits", "caught", "the last look"], rows)


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line, or end with an error in one line."""
    parser = words_of(__doc__)
    parser.add_argument("--data", default="digits", choices=("digits", "fashion_mnist_small"))
    parser.add_argument("--methods", default="rslad")
    parser.add_argument("--attacks", default=";".join(ATTACKS), help="separated by semicolons or commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="in place of the setting's: for a try")
    parser.add_argument("--autoattack-images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=15, help="of timing, each with --steps steps of every attack")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/one_step"))
    parser.add_argument("--results", type=Path, help=f"default: {RESULTS}/DATA")
    words = parser.parse_args()
    words.attacks = words.attacks.split(";") if ";" in words.attacks else words.attacks.split(",")
    words.methods = words.methods.split(",")
    known = {"--attacks": (words.attacks, ATTACKS), "--methods": (words.methods, settings_on(words.data))}
    for option, (given, there) in known.items():
        if unknown := [name for name in given if name not in there]:
            parser.error(f"{option} {','.join(unknown)}: there are {', '.join(there)}")
    words.results = words.results or RESULTS / words.data
    return words


def main() -> None:
    words = arguments()
    torch.set_num_threads(1)  # the same bits on every machine
    words.results.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "setting": words.data,
        "seeds": words.seeds,
        "accuracy": [],
        "autoattack": words.autoattack_images,
    }
    found, folders = all_trained(words)
    tables = {"accuracy.md": accuracy_table(found)}
    content["accuracy"] = [
        {"method": method, "attack": attack, "runs": [_figures(one) for one in seeds]}
        for (method, attack), seeds in found.items()
    ]
    settings = settings_on(words.data)
    with locked(words.out / ".timing.lock"):  # one process at a time
        content["seconds"] = {m: timed(settings[m], words.attacks, words.rounds, words.steps) for m in words.methods}
    tables["seconds.md"] = seconds_table(content["seconds"])
    if words.data == "digits":
        content["collapses"] = collapses(words)
        tables["guard.md"] = guard_table(content["collapses"])
    for name, text in tables.items():
        print(f"{text}\n")
        write_atomically(words.results / name, text.encode())
    pack(folders, KEPT, words.results / RECORDS)
    content["trained_at"] = commits(folders)
    write_summary(words.results / "one_step.json", content, DEVICE)


def _figures(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of one run that the tables are made of."""
    attacks = {
        name: {key: evaluation["attacks"][name][key] for key in ("average", "worst", "nsd")} for name in EVALUATED
    }
    return {**attacks, "seconds": evaluation["seconds"], "fell_back": evaluation["fell_back"]}


if __name__ == "__main__":
    sys.exit(reported(main, goes_on=True))
