"""Runs a module on the recorder and tells what it asked of CUDA: python -m dry_run.observed FILE MODULE [WORD...].

Writes to FILE: its exit status, what was illegal, what made the host wait, the graphs that were launched.
"""

import json
import runpy
import sys
from collections import Counter
from pathlib import Path

from dry_run.record import Recorder, illegal, waits
from dry_run.values import sound_values


def main() -> None:
    file, module, *words = sys.argv[1:]
    recorder = Recorder()
    sys.argv = [module, *words]
    status: object = 0
    try:
        with sound_values():
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        status = ended.code or 0
    finally:
        records = recorder.records()
        content = {
            "status": status,
            "illegal": illegal(records),
            "waits": waits(records),
            "graphs": Counter(one.name for one in records if one.kind == "graph"),
        }
        Path(file).write_text(json.dumps(content, indent=1) + "\n")
    sys.exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    main()
