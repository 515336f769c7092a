"""Runs retemper on the recorder and tells what it asked of CUDA: python -m dry_run.observed FILE VERB [WORD...].

Writes to FILE: its exit status, what was illegal, what made the host wait, the graphs that were launched.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from dry_run.record import Recorder, illegal, waits
from dry_run.values import sound_values
from retemper.cli import run


def main() -> None:
    file, *words = sys.argv[1:]
    recorder = Recorder()
    with sound_values():
        status = run(words)
    records = recorder.records()
    content = {
        "status": status,
        "illegal": illegal(records),
        "waits": waits(records),
        "graphs": Counter(one.name for one in records if one.kind == "graph"),
    }
    Path(file).write_text(json.dumps(content, indent=1) + "\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
