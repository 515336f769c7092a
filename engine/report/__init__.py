"""The page that compares runs by class: what it says (words), shows (plots) and looks like (page)."""

from retemper.engine.report.build import Report, write_report
from retemper.engine.report.run import read_run

__all__ = ["Report", "read_run", "write_report"]
