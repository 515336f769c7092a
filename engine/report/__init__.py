"""The page that compares runs by class: what it says (words), shows (plots) and looks like (page)."""

from retemper.engine.report.build import Report, write_report
from retemper.engine.report.plot_style import require_plots
from retemper.engine.report.read import read_run

__all__ = ["Report", "read_run", "require_plots", "write_report"]
