"""The report page that compares runs class by class. Its figures need matplotlib, which is an extra."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from retemper.errors import UsageError

__all__ = ["require_plots", "write_report"]


def require_plots() -> None:
    """Raise UsageError unless matplotlib, the extra `plots`, is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("the figures need matplotlib: pip install 'retemper[plots]'")


def write_report(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write report.html, report.md and the figures of the runs into the folder `out`.

    Args:
        folders: of runs, or of evaluations.
    Returns:
        The path of report.html.
    Raises:
        DataError: a folder holds no run.
        UsageError: no folder is given, `out` cannot be made, or matplotlib is missing.
    """
    require_plots()
    from retemper.engine.report.build import build_report

    return build_report(folders, out)
