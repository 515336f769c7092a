"""How long the kernels, the loaders, the attack and the step take here, beside what a user would take instead.

`timing.py` is the protocol; a module each says what is raced; `record.py` is what comes out.
"""

from retemper.engine.bench.plan import Request
from retemper.engine.bench.record import as_table, as_text, save
from retemper.engine.bench.run import bench

__all__ = ["Request", "as_table", "as_text", "bench", "save"]
