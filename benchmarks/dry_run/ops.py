"""Prints the operators of a step, in a process of the recorder: python -m dry_run.ops METHOD:SETTING [OPTION=VALUE...].

Options are the recipe's, as in `average=ema`; besides, `given=true` for a teacher whose logits are known,
`deterministic=true`, and `batch=N`.
"""

import json
import re
import sys
from collections import Counter
from typing import Any

from dry_run import roofline
from dry_run.convolution import read
from dry_run.counting import faults
from dry_run.record import Recorder
from dry_run.step_count import Setting, counted

OWN = {"given", "deterministic", "batch"}  # options of the count, not of the recipe


def value_of(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def short(kind: str, name: str) -> str:
    """Return what tells a launch apart from others of its operator."""
    if kind == "convolution":
        plan = read(name)
        return " + ".join((plan.kind, *plan.fused))
    bare = re.sub(r"at::native::(\(anonymous namespace\)::)?|^void ", "", name)
    functor = re.search(r"<.*?(\w+(?:[Ff]unctor\w*|_kernel_cuda|_kernel_impl))", bare)
    return re.split(r"[<( ]", bare)[0] + (f" {functor[1]}" if functor else "")


def main() -> None:
    name, *words = sys.argv[1:]
    options = {key: value_of(value) for key, _, value in (word.partition("=") for word in words)}
    own = {key: options.pop(key) for key in OWN & options.keys()}
    counts = counted(Setting(name, options, **own), Recorder())
    rows = Counter((op.phase, op.name, kind, short(kind, launch)) for op in counts.ops for kind, launch in op.launches)
    for phase, number in counts.launches.items():
        print(f"{phase}: {number} launches, {counts.bytes.get(phase, 0) / 1e6:,.0f} MB")
        for (where, op, kind, launch), times in sorted(rows.items(), key=lambda row: -row[1]):
            if where == phase:
                print(f"  {times:5} {op:48} {kind:12} {launch}")
    model = sum(roofline.seconds(counts.ops).values())
    print(f"in all {sum(counts.launches.values())} launches; the model says {1e3 * model:.1f} ms")
    print(*(f"  a replay: {line}" for line in counts.replay), *faults(counts), sep="\n")


if __name__ == "__main__":
    main()
