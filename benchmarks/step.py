"""What makes a training step fast: the authors' script, then one thing more a row?

    python benchmarks/step.py --json step.json              also --only resnet18, --batch 128, --quick, --device cpu

`ratio` is a row's time in the first row's: below 1 is faster than the authors' script.

    python benchmarks/step.py --profile DIR                 where the time goes: a table and a trace for each student
"""

import sys
from pathlib import Path

import torch

from retemper.engine.cli import main

if __name__ == "__main__":
    if "--profile" in sys.argv:
        from retemper.engine.bench import Request
        from retemper.engine.bench.profile_step import profile_step

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        request = Request(what="step", device=device, quick="--quick" in sys.argv)
        profile_step(request, Path(sys.argv[sys.argv.index("--profile") + 1]))
    else:
        main(["bench", "step", *sys.argv[1:]])
