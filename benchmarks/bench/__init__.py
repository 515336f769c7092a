"""The benchmarks of kernels, loaders, attack and step on this machine, beside what a user would take instead.

case.py says what a case is, timing.py how it is measured, result.py what comes out; kernels.py, loaders.py, attack.py
and step.py hold the cases.
"""

from retemper.bench.benchmark import bench
from retemper.bench.case import Request
from retemper.bench.result import as_table, as_text, begun, save

__all__ = ["Request", "as_table", "as_text", "begun", "bench", "save"]
