"""What does label trust cost? A training step of it and of RSLAD, in turns in one process, on the digits settings.

    python benchmarks/label_trust.py --rounds 300 --json benchmarks/results/cpu/label_trust.json

`ratio` is a row's time in RSLAD's, round by round, with its 10th and 90th percentile; the interval below the table is
that of the median. "RSLAD once more" says what the machine alone does. Teachers' answers are known, as they are after a
run's first epochs: nothing else hides what a loss costs. The networks are random, their sizes real. Prints a table;
writes all figures to --json.
"""

from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runs import DEVICE
from summary import words_of

from retemper.bench import Request, as_table, save
from retemper.bench.case import Case, Contender, Work
from retemper.bench.machine import Rates
from retemper.bench.result import header
from retemper.bench.timing import measure
from retemper.engine import Recipe, State, create_model, train_step
from retemper.engine.catalogue import find_setting
from retemper.engine.speed.capture import captured

APART: dict[str, Any] = dict(joint=False, average="none")
OFF = APART | dict(trust_rate=0.0, weight_rate=0.0)
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "RSLAD": ("rslad", {}),
    "RSLAD once more": ("rslad", {}),
    "label trust, all parts off": ("label_trust", OFF),
    "trust": ("label_trust", OFF | dict(trust_rate=0.1)),
    "weights": ("label_trust", OFF | dict(weight_rate=0.4)),
    "trust and weights": ("label_trust", APART),
    "trust and weights, joint": ("label_trust", APART | dict(joint=True)),
    "label trust: trust and weights, joint, averaged": ("label_trust", {}),
    "ABSLD": ("absld", {}),
}
INPUTS = 8  # batches that take turns


def contender(name: str, recipe: Recipe, device: torch.device) -> Contender:
    """Return the contender that makes steps of `recipe` on the same random batches as all others."""
    torch.manual_seed(0)
    state = State(recipe, create_model(recipe.networks.student, 10), create_model("tiny_resnet_wide", 10), 10, device)
    shape = recipe.optim.batch_size, 1, 8, 8
    batches = cycle(
        [
            (
                torch.rand(shape, device=device).to(memory_format=torch.channels_last),
                torch.randint(10, shape[:1], device=device),
                torch.randn(shape[0], 10, device=device),
            )
            for _ in range(INPUTS)
        ]
    )

    def step(*batch: torch.Tensor) -> torch.Tensor:
        return train_step(state, recipe, *batch)

    one = captured(step) if recipe.execution.captures_on(device) else step
    return Contender(name=name, call=lambda: one(*next(batches)), exactness="different algorithm")


def median_interval(ratios: np.ndarray, draws: int = 2_000) -> tuple[float, float]:
    """Return the bootstrap interval of the median at 95 %: the rounds are resampled."""
    drawn = np.random.default_rng(0).choice(ratios, (draws, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975)).tolist()
    return low, high


def main() -> None:
    parser = words_of(__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    torch.set_num_threads(1)
    rows = {
        name: find_setting(f"{method}:digits")[2].recipe.replace(batch_size=words.batch, **fields)
        for name, (method, fields) in ROWS.items()
    }
    case = Case(
        name=f"step on digits, batch {words.batch}",
        contenders=[contender(name, recipe, DEVICE) for name, recipe in rows.items()],
        work=Work(images=words.batch),
    )
    command = f"python benchmarks/label_trust.py --rounds {words.rounds} --batch {words.batch}"
    result = header(Request(what="step", device=DEVICE, rounds=words.rounds)) | {"command": command}
    result["rows"] = measure(case, DEVICE, words.rounds, Rates(DEVICE))
    print(as_table(result["rows"]))
    base = np.array(result["rows"][0]["round_ms"])
    for row in result["rows"][1:]:
        low, high = median_interval(np.array(row["round_ms"]) / base)
        row["ratio"] |= {"low": low, "high": high}
        print(f"{row['name']}: {row['ratio']['median']:.3f} of RSLAD's ({low:.3f} to {high:.3f})")
    result["complete"] = True
    if words.json:
        words.json.parent.mkdir(parents=True, exist_ok=True)
        save(words.json, result)


if __name__ == "__main__":
    main()
