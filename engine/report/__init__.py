"""The report page that compares runs class by class."""

from retemper.engine.report.build import write_report
from retemper.engine.report.plot_style import require_plots

__all__ = ["require_plots", "write_report"]
