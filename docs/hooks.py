"""What mkdocs needs beyond docs/: the pictures that lie beside the results which they show.

A page names such a picture by its place in the repository, `../benchmarks/results/FOLDER/fairness.png`, so that the
page can be read there too. The site gets a copy of it under `results/`.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

RESULTS = Path(__file__).parent.parent / "benchmarks/results"
PICTURE = re.compile(r"\]\(\.\./benchmarks/results/([^)]+\.png)\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add every picture that lies among the results."""
    for path in sorted(RESULTS.rglob("*.png")):
        name = f"results/{path.relative_to(RESULTS).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point a page's links to such pictures at the copies."""
    up = "../" * page.file.src_uri.count("/")
    return PICTURE.sub(rf"]({up}results/\1)", markdown)
