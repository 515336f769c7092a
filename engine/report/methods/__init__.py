"""The page that compares many methods, a row each: accuracies by attack, the worst class, what it cost, the teacher."""

from collections.abc import Sequence
from pathlib import Path

from retemper.engine.report import require_plots

__all__ = ["write_comparison"]


def write_comparison(
    targets: Sequence[Path], out: Path, against: Path | None = None, *, other_data: bool = False
) -> Path:
    """Write comparison.html, .md, .csv and .tex, and the figures, into the folder `out`.

    Args:
        targets: folders of runs or of evaluations, or folders of such folders. Seeds of one recipe become one row.
        against: a CSV file of published numbers, to be set beside them (`published.py`).
        other_data: take published numbers on other data too.
    Returns:
        The path of comparison.html.
    Raises:
        DataError: a folder holds no run, no run was evaluated, or the CSV file is not as it must be.
        UsageError: the published numbers are on other data, `out` cannot be made, or matplotlib is missing.
    """
    require_plots()
    from retemper.engine.report.methods.build import build_comparison

    return build_comparison(targets, out, against, other_data=other_data)
