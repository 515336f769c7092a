"""AutoAttack's standard suite through our runner, against the library's own: the verdicts, and the time.

    python benchmarks/autoattack.py runs/demo/rslad runs/demo/absld --images 500 --json FILE

Piece by piece of a run's test images, in turns that rotate: the library's runner on the network as PyTorch makes it,
our runner on the network (the same verdicts, image by image), and on its folded twin (--fold). Without a GPU, seconds
are CPU time. Then, unless --kills is 0, the first run is evaluated by the command line while being killed with -9 at
random, and its ledger compared with that of an evaluation left alone. Prints a table; writes all figures to --json.
"""

import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from runs import DEVICE
from summary import markdown, words_of, write_summary
from torch import nn

from retemper.console import say
from retemper.engine import create_model, load_checkpoint
from retemper.engine.checkpoints.header import load_network, read_facts
from retemper.engine.device import exact_fp32
from retemper.engine.evaluation.autoattack import SuiteRequest, run_suite
from retemper.engine.evaluation.ledger import Ledger
from retemper.engine.predict import as_float, balanced_order, predicted
from retemper.engine.run.run_folder import RunFolder
from retemper.loaders import Split, load_split

CLI = [sys.executable, "-c", "from retemper.cli import main; main()"]


def stock(model: nn.Module, split: Split, rows: np.ndarray, request: SuiteRequest) -> np.ndarray:
    """Return the verdicts of the library's own runner, (N,) bool: whether each image held."""
    from pyautoattack import AutoAttack

    clean = as_float(split, torch.from_numpy(rows), request.device).contiguous()
    label_N = torch.from_numpy(split.labels[rows]).to(request.device)
    with exact_fp32():
        suite = AutoAttack(model, eps=request.eps, version="standard", seed=request.seed, device=str(request.device))
        _, given_N = suite.run_standard_evaluation(clean, label_N, batch_size=request.batch_size)
    return (given_N == label_N).cpu().numpy()


def ours(model: nn.Module, split: Split, rows: np.ndarray, request: SuiteRequest, folder: str) -> np.ndarray:
    """Return the verdicts of our runner, (N,) bool: whether each image held."""
    ledger = Ledger(Path(folder) / "autoattack.csv", {"eps": request.eps}, rows, split.labels[rows])
    assert run_suite(model, split, request, ledger)
    return ledger.holds(request.attacks)


def compared(run: Path, images: int, piece: int, batch_size: int, device: torch.device) -> dict[str, Any]:
    """Return the seconds and verdicts of the three runners on one run, and how often ours disagree."""
    weights = RunFolder(run).best
    facts = read_facts(weights)
    assert facts.model and facts.num_classes and facts.dataset and facts.eps
    split = load_split(facts.dataset, "test", None, facts.image_size)
    plain = load_network(weights, facts, device)
    users = create_model(facts.model, facts.num_classes, channels=facts.channels)
    load_checkpoint(weights, users)
    users = users.to(device).eval()
    order = balanced_order(split.labels, images)
    verdicts: dict[str, list[np.ndarray]] = {"stock": [], "plain": [], "folded": []}
    seconds: dict[str, list[float]] = {name: [] for name in verdicts}
    for number, first in enumerate(range(0, len(order), piece)):
        rows = order[first : first + piece]
        for turn in range(3):
            name = ("stock", "plain", "folded")[(number + turn) % 3]
            request = SuiteRequest(eps=facts.eps, device=device, batch_size=batch_size, fold=name == "folded")
            clock = time.perf_counter if device.type == "cuda" else time.process_time  # a busy core does not count
            started = clock()
            with TemporaryDirectory() as folder:
                found = (
                    stock(users, split, rows, request) if name == "stock" else ours(plain, split, rows, request, folder)
                )
            seconds[name].append(clock() - started)
            verdicts[name].append(found)
        say(f"{run.name}: {first + len(rows)} of {len(order)} images")
    holds = {name: np.concatenate(found) for name, found in verdicts.items()}
    with torch.no_grad():
        clean = predicted(plain(as_float(split, torch.from_numpy(order), device))).cpu().numpy() == split.labels[order]
    return {
        "run": run.name,
        "images": len(order),
        "clean": float(clean.mean()),
        "robust": {name: float(found.mean()) for name, found in holds.items()},
        "disagreements": {name: int((holds[name] != holds["stock"]).sum()) for name in ("plain", "folded")},
        "seconds": seconds,
        "times_as_fast": {
            name: [a / b for a, b in zip(seconds["stock"], seconds[name], strict=True)] for name in ("plain", "folded")
        },
    }


def killed(run: Path, images: int, batch_size: int, kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill an evaluation again and again, and say whether it ends with the ledger of one left alone."""
    draw = random.Random(seed)
    options = ["--attacks", "autoattack", "--limit", str(images), "--batch-size", str(batch_size)]
    rows, done = [], 0
    with TemporaryDirectory() as folder:
        alone, hunted = Path(folder) / "alone", Path(folder) / "hunted"
        subprocess.run([*CLI, "evaluate", str(run), *options, "--out", str(alone)], check=True, capture_output=True)
        ledger = hunted / "autoattack.csv"
        while True:
            process = subprocess.Popen(
                [*CLI, "evaluate", str(run), *options, "--out", str(hunted)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            written = ledger.stat().st_mtime_ns if ledger.exists() else 0
            while done < kills and process.poll() is None:  # until it has done something, and then a moment longer
                if ledger.exists() and ledger.stat().st_mtime_ns != written:
                    break
                time.sleep(0.01)
            try:
                process.wait(draw.uniform(0, 1) if done < kills else None)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                done += 1
                rows.append(int(Ledger.read(ledger).tried_N.sum()))
        assert process.returncode == 0, process.returncode
        tables = [(folder / "autoattack.csv").read_text().partition("\n")[2] for folder in (alone, hunted)]
    return {"kills": done, "attacks_done_at_each": rows, "same_ledger": tables[0] == tables[1], "images": images}


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table with a line for each network and runner."""
    head = ["network", "images", "runner", "robust", "other verdicts", "times as fast (by piece)"]
    lines = []
    for one in results:
        lines.append([one["run"], one["images"], "the library's", f"{one['robust']['stock']:.1%}", "", 1])
        for name in ("plain", "folded"):
            ratios = one["times_as_fast"][name]
            whole = sum(one["seconds"]["stock"]) / sum(one["seconds"][name])
            speed = f"{whole:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            robust, others = f"{one['robust'][name]:.1%}", one["disagreements"][name]
            lines.append([one["run"], one["images"], f"ours, {name}", robust, others, speed])
    return markdown(head, lines)


def main() -> None:
    parser = words_of(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--piece", type=int, default=100, help="images a turn")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    results = [compared(run, words.images, words.piece, words.batch_size, DEVICE) for run in words.runs]
    print(table(results))
    content = {"results": results, "piece": words.piece, "batch_size": words.batch_size}
    content["median_times_as_fast"] = {
        name: statistics.median(ratio for one in results for ratio in one["times_as_fast"][name])
        for name in ("plain", "folded")
    }
    if words.kills:
        content["killed"] = killed(words.runs[0], min(60, words.images), 8, words.kills)
        print(f"killed {content['killed']['kills']} times: same ledger: {content['killed']['same_ledger']}")
    write_summary(words.json, content, DEVICE)


if __name__ == "__main__":
    main()
