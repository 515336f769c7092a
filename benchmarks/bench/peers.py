"""The libraries that a user would take instead, each imported as it needs to be; none of them is required.

pip install 'retemper[bench]'
"""

from importlib.util import find_spec
from typing import Any

from retemper.packages import import_package

INSTALL = "pip install 'retemper[bench]'"


def missing(*packages: str) -> str | None:
    """Return the reason why a row that needs these packages cannot be measured here, or None."""
    absent = [package for package in packages if find_spec(package) is None]
    return f"needs {', '.join(absent)}: {INSTALL}" if absent else None


def library(name: str) -> Any:
    """Return the module of that name, untyped, imported without its warnings. Raises ImportError."""
    return import_package(name)
