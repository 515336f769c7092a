"""Jinja2 templates: text files that lie beside the module that fills them in."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def render(folder: Path, name: str, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """Fill in the template `name` of `folder`; what stands in an HTML template is escaped, an unknown name is an error.

    Args:
        filters: name -> function, for use in the template after a `|`.
    """
    import jinja2  # here, not above: the kernels and the benchmarks run without it

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=name.endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(filters or {})
    return environment.get_template(name).render(values)
