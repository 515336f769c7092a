"""The engine where Triton is not installed, as with a build of PyTorch for CPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

TRAIN = """
import sys
sys.modules["triton"] = None  # as where it is not installed
from retemper.cli import run

words = "train sat:digits --epochs 1 --attack-steps 1 --holdout-per-class 5 --select-steps 1 --batch-size 256"
assert run([*words.split(), "--out", "run"]) == 0
assert run("evaluate run --attacks clean,fgsm --limit 20".split()) == 0
assert run(["doctor"]) == 0
"""


def test_it_trains_evaluates_and_says_so(tmp_path: Path) -> None:
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", TRAIN], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("triton "))
    assert line.split()[1] == "missing"
    assert "triton" not in json.loads((tmp_path / "run/config.json").read_text())["versions"]
