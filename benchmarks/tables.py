"""The tables of results in README.md and docs/, written by this command and never by hand.

    python benchmarks/tables.py            rewrite the documents from benchmarks/results
    python benchmarks/tables.py --check    say whether they are up to date: exit status 1 if not

A document names a file of results between two markers, and holds the whole file there:

    <!-- benchmarks/results/FILE.md -->
    <!-- / -->

Studies write such files themselves. This command writes three more from the JSON files of `retemper bench`: speed.md,
calls.md with the host's time of a call and the first call of each kernel, and kernels_cpu.md with every kernel on a
CPU. What stands in the first is decided in `HEADLINES`, whatever the results are; in the others stands every row there
is. Where several files have measured the same thing on the same device, the last by name is shown; those of --quick
runs, and of rehearsals, which compute nothing, are passed over. "times as fast" is theirs over ours, round by round:
the median and, in brackets, the 10th and 90th percentile.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS, SPEED, CALLS, ON_CPU = "benchmarks/results", "speed.md", "calls.md", "kernels_cpu.md"
BEGIN, END = rf"<!-- {RESULTS}/([\w./-]+\.md) -->", "<!-- / -->"
HEAD = ["| what | device | ours | against | theirs | times as fast | command |", "|---|---|---|---|---|---|---|"]
NO_GPU = "not measured on a GPU yet"


@dataclass(frozen=True)
class Headline:
    """A result to show: our row of the benchmark tables that match, beside those of others.

    Attributes:
        label: "{}" in it stands for what the group in `table` matches, and for `usual` where nothing was measured.
        table: a pattern of the whole name of a table of `retemper bench` `what`.
        cpu: show results on CPUs too; of some a CPU says nothing.
        gpu: say so where there is no result on a GPU.
    """

    label: str
    what: str
    table: str
    ours: str
    others: tuple[str, ...]
    command: str
    cpu: bool = False
    gpu: bool = True
    usual: str = ""


EAGER = ("eager chain", "torch.compile of it")
SCRIPT = ("released script", "careful PyTorch", "careful PyTorch, torch.compile")
PEERS = ("torchattacks.PGD", "foolbox.LinfPGD")
HEADLINES = (
    *(
        Headline(f"ABSLD step, {name}, batch 128", "step", f"ladder, {model} batch 128", "+ CUDA graph", SCRIPT,
                 f"retemper bench step --only {model} --batch 128")
        for name, model in (("ResNet-18", "resnet18"), ("MobileNetV2", "mobilenet_v2"))
    ),
    *(
        Headline(f"ABSLD step, {name}{what}", "step", f"ladder, {model} batch (\\d+)", ours,
                 ("released script", "careful PyTorch"), f"retemper bench step --only {model}",
                 cpu=True, gpu=False, usual=usual)
        for name, model, usual in (("tiny ResNet on 8 x 8, batch {}", "tiny_resnet", "128"),
                                   ("MobileNetV2, batch {}", "mobilenet_v2", "8"),
                                   ("ResNet-18, batch {}", "resnet18", "4"))
        for what, ours in ((", first epoch", "+ teacher for 8 batches at once"),
                           (", teacher's table full", "+ table, every view known"))
    ),
    Headline("PGD-10, ResNet-18, batch {}", "attack", r"resnet18 ce PGD-10 (?:tf32|fp32) batch (\d+)", "retemper",
             PEERS, "retemper bench attack --only resnet18", cpu=True, usual="128"),
    Headline("`pgd_step_`, 256 MB", "kernels", r"pgd_step_ fp32 21845x3x32x32", "retemper", EAGER,
             "retemper bench kernels --only pgd_step_"),
    Headline("KL with gradient, 128 x 10", "kernels", r"class_temperature_kl forward and backward fp32 128x10",
             "retemper", (*EAGER, "Liger, teacher tempered beforehand"), "retemper bench kernels --only class_temp"),
    Headline("crop and flip, 256 MB", "kernels", r"augment fp32 21845x3x32x32", "retemper", EAGER,
             "retemper bench kernels --only augment"),
    Headline("epoch of {} images, 32 x 32", "loaders", r"([\d,]+) images of 32x32x3 batch 128", "retemper, resident",
             ("retemper, ffcv", "FFCV's own operations", "torchvision, 2 workers"), "retemper bench loaders",
             cpu=True, usual="50,000"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    words = parser.parse_args()
    try:
        stale = {path: text for path, text in written(words.root) if not path.exists() or path.read_text() != text}
    except ValueError as error:
        sys.exit(str(error))
    if words.check and stale:
        names = ", ".join(str(path.relative_to(words.root)) for path in stale)
        sys.exit(f"{names}: not what {RESULTS} says: run python benchmarks/tables.py")
    for path, text in stale.items():
        path.write_text(text)


def written(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield the path of the table of speeds and of every document, each with the text that it should hold.

    Raises:
        ValueError: a document names a file that is missing, or a marker that ends one is missing.
    """
    results = root / RESULTS
    found = read_results(results)
    lines = {SPEED: table(found), CALLS: calls_table(found), ON_CPU: cpu_table(found)}
    made = {name: "\n".join([*rows, ""]) for name, rows in lines.items()}
    for name, text in made.items():
        yield results / name, text
    for document in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        try:
            yield document, with_files(document.read_text(), results, made)
        except ValueError as error:
            raise ValueError(f"{document}: {error}") from None


def with_files(text: str, results: Path, made: dict[str, str]) -> str:
    """Return the document with each file that it names between its two markers.

    Args:
        made: the text of files that are about to be written, by name.
    Raises:
        ValueError: a file that it names is missing, or a marker that ends one.
    """

    def with_file(found: re.Match[str]) -> str:
        path = results / found[2]
        if found[2] not in made and not path.is_file():
            raise ValueError(f"it names {path}, which does not exist")
        return f"{found[1]}\n{made.get(found[2]) or path.read_text()}{END}"

    if len(re.findall(BEGIN, text)) != text.count(END):
        raise ValueError(f"every file that it names needs a line {END} below")
    return re.sub(f"({BEGIN}).*?{END}", with_file, text, flags=re.DOTALL)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the results of `retemper bench` in a folder and below it, sorted by path, but for quick runs."""
    found = [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]
    return [
        one
        for one in found
        if isinstance(one, dict)
        and {"what", "rows", "device", "command"} <= one.keys()
        and "--quick" not in one["command"]
        and one.get("checked", True)
    ]


def table(results: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table of speeds, a GPU's rows before a CPU's."""
    lines = []
    for headline in HEADLINES:
        devices = {}
        for result in results:
            if result["what"] == headline.what:
                for name in dict.fromkeys(row["table"] for row in result["rows"]):
                    if found := re.fullmatch(headline.table, name):
                        rows = [row for row in result["rows"] if row["table"] == name]
                        devices[result["device"]] = headline.label.format(*found.groups()), rows
        on_gpu = {device: rows for device, rows in devices.items() if device.startswith("cuda")}
        for device, (label, rows) in on_gpu.items():
            lines += shown(headline, label, device, rows)
        if not on_gpu and headline.gpu:
            label, others = headline.label.format(headline.usual), "; ".join(headline.others)
            lines.append(line(label, NO_GPU, "", others, "", "", f"`{headline.command}`"))
        for device, (label, rows) in devices.items() if headline.cpu else ():
            if device not in on_gpu:
                lines += shown(headline, label, device, rows)
    return [*HEAD, *lines]


def calls_table(results: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table of calls: the host's time, and what the first call of a process takes."""
    lines = [
        "| kernel | device | a call | its operators alone | eager chain | first call | eager chain |",
        "|---|---|---|---|---|---|---|",
    ]
    for device, tables in kernel_tables(results).items():
        for title, rows in tables.items():
            kernel = title.removeprefix("host time, ")
            if kernel == title:
                continue
            first = tables.get(f"first call, {kernel}", {})
            cells = [microseconds(rows.get(name)) for name in ("retemper", "the operators alone", "eager chain")]
            cells += [milliseconds(first.get(name)) for name in ("retemper", "eager chain")]
            lines.append(line(f"`{kernel}`", spoken(device), *cells))
        for name, row in tables.get("first call, imports", {}).items():
            lines.append(line(f"`{name}`", spoken(device), "", "", "", milliseconds(row), ""))
    return lines


def cpu_table(results: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table of all kernels on a CPU, whichever is faster."""
    lines = ["| kernel | device | ours | eager chain | times as fast |", "|---|---|---|---|---|"]
    for device, tables in kernel_tables(results).items():
        for title, rows in tables.items() if device.startswith("cpu") else ():
            if title.startswith(("host time", "first call", "sweep")) or not {"retemper", "eager chain"} <= rows.keys():
                continue
            ours, eager = rows["retemper"], rows["eager chain"]
            lines.append(line(f"`{title}`", spoken(device), time(ours), time(eager), times_as_fast(ours, eager)))
    return lines


def kernel_tables(results: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the rows of `retemper bench kernels`: of each device the tables, and of each table the rows, by name."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for result in results:
        for row in result["rows"] if result["what"] == "kernels" else ():
            found.setdefault(result["device"], {}).setdefault(row["table"], {})[row["name"]] = row
    return found


def microseconds(row: dict[str, Any] | None) -> str:
    """Return the median time that a call held the host."""
    if row is None or row["ms"] is None:
        return "-"
    return f"{1e3 * (row.get('host_ms') or row['ms'])['median']:,.0f} us"


def milliseconds(row: dict[str, Any] | None) -> str:
    return "-" if row is None or row["ms"] is None else time(row)


def shown(headline: Headline, label: str, device: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a line for each of the headline's others that has a row."""
    by_name = {row["name"]: row for row in rows}
    ours = by_name.get(headline.ours)
    for name in headline.others:
        theirs = by_name.get(name)
        if ours is None or theirs is None:
            continue
        cells = (time(ours), name, time(theirs), times_as_fast(ours, theirs))
        yield line(label, spoken(device), *cells, f"`{headline.command}`")


def times_as_fast(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Return their time over ours, round by round: median, 10th and 90th percentile."""
    if ours["ms"] is None or theirs["ms"] is None:
        return "-"
    ratios = [slow / fast for slow, fast in zip(theirs["round_ms"], ours["round_ms"], strict=True)]
    p10, median, p90 = np.percentile(ratios, (10, 50, 90))
    return f"{median:.2f} ({p10:.2f} to {p90:.2f})"


def time(row: dict[str, Any]) -> str:
    """Return the median time of a row, or the reason why there is none."""
    if row["ms"] is None:
        return row["reason"].replace("|", "/")
    ms = row["ms"]["median"]
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


def spoken(device: str) -> str:
    """Return the name of a device without its kind: "cpu: AMD EPYC, 1 threads" becomes "AMD EPYC, 1 thread"."""
    return device.partition(": ")[2].replace(" 1 threads", " 1 thread") or device


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
