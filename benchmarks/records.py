"""The records of a study's runs in one file, from which its tables can be made again.

A run's records are text files of its folder: settings, measurements, verdicts. `RECORDS` holds those of all runs of a
study: one JSON object, {file name: {run: text}}, compressed. The same records give the same bytes.
"""

import json
import lzma
import re
from collections.abc import Iterable
from pathlib import Path

from retemper.errors import DataError
from retemper.files import write_atomically

RECORDS = "records.json.xz"


def pack(runs: Iterable[Path], names: Iterable[str], path: Path) -> None:
    """Write the files `names` of the runs' folders into one file, without the folders of this machine.

    Args:
        runs: folders whose names differ; one may be given twice.
        names: of text files that each of them has.
        path: the file to write.
    """
    folders = list(runs)
    content = {
        name: {run.name: without_folders((run / name).read_bytes().decode()) for run in folders} for name in names
    }
    write_atomically(path, lzma.compress(json.dumps(content, sort_keys=True).encode(), preset=9))


def unpack(path: Path, to: Path) -> dict[str, Path]:
    """Write the records as files again, a folder a run.

    Returns:
        The folder of each run, by the run's name.

    Raises:
        DataError: there is no such file, or it is damaged.
    """
    try:
        content = json.loads(lzma.decompress(path.read_bytes()))
    except (OSError, lzma.LZMAError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error})") from None
    for name, runs in content.items():
        for run, text in runs.items():
            (to / run).mkdir(parents=True, exist_ok=True)
            (to / run / name).write_bytes(text.encode())
    return {run: to / run for runs in content.values() for run in runs}


def without_folders(text: str) -> str:
    """Return the text with each absolute path in it, and the value of "out" and "path", cut down to its last name."""
    text = re.sub(r'("(?:out|path)": ")[^"]*/', r"\1", text)
    return re.sub(r"(?<![\w.-])/(?:[\w.-]+/)+", "", text)
