"""The unattended GPU suite names things that exist, and the documents' tables are what the committed results say."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from retemper.arguments import command_line

ROOT = Path(__file__).resolve().parents[2]
SUITE = ROOT / "benchmarks/gpu_suite.sh"


def test_the_suite_is_shell() -> None:
    subprocess.run(["bash", "-n", SUITE], check=True)


def test_every_part_of_the_suite_is_a_command_that_exists(tmp_path: Path) -> None:
    listed = {"PATH": os.environ["PATH"], "SUITE_LIST": "1", "PYTHON": "python3"}
    told = subprocess.run(["bash", SUITE, tmp_path], env=listed, capture_output=True, text=True, check=True)
    parts = dict(line.split(": ", 1) for line in told.stdout.splitlines() if not line.startswith(" "))
    assert {"tests", "kernels_images", "sweep_kl", "loaders", "digits", "step_resnet18_1024"} <= parts.keys()
    for name, command in parts.items():
        words = shlex.split(command)
        if words[0] == "compute-sanitizer":
            words = words[words.index("python3") :]
        if words[:3] == ["python3", "-m", "retemper"]:
            command_line()[0].parse_args(words[3:])
        elif words[:3] == ["python3", "-m", "pytest"]:
            assert all((ROOT / word).exists() for word in words if word.startswith("tests/")), name
        elif words[0] == "python3":
            assert (ROOT / words[1]).is_file(), name
        else:
            assert words[0] in ("nvidia-smi", "bash"), name


def test_a_part_runs_once_and_a_failure_is_noted(tmp_path: Path) -> None:
    def suite(parts: str, python: str) -> subprocess.CompletedProcess[str]:
        words = {"PATH": os.environ["PATH"], "SUITE_PARTS": parts, "PYTHON": python}
        return subprocess.run(["bash", SUITE, tmp_path], env=words, capture_output=True, text=True)

    ran, fails = tmp_path / "ran", tmp_path / "python"
    fails.write_text(
        f'#!/bin/sh\ncase "$1" in -) exit 0;; *) echo run >> {shlex.quote(str(ran))}; exit ${{CODE:-3}};; esac\n'
    )
    fails.chmod(0o755)
    told = suite("kernels_images loaders", str(fails))
    assert told.returncode == 1 and "failed: kernels_images loaders" in told.stdout
    assert ran.read_text() == "run\nrun\n" and not (tmp_path / "done.txt").exists()
    fails.write_text(f'#!/bin/sh\ncase "$1" in -) exit 0;; *) echo run >> {shlex.quote(str(ran))}; exit 0;; esac\n')
    for _ in range(2):
        assert suite("loaders", str(fails)).returncode == 0
    assert ran.read_text() == "run\n" * 3 and (tmp_path / "done.txt").read_text().startswith("loaders ")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks/tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tables"] = module
    spec.loader.exec_module(module)
    return module


def run_tables(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "benchmarks/tables.py", *words], capture_output=True, text=True)


def test_the_documents_say_what_the_results_say() -> None:
    checked = run_tables("--check")
    assert checked.returncode == 0, checked.stderr


def result(device: str, what: str, table: str, rows: dict[str, list[float]], command: str = "x") -> dict[str, Any]:
    """A file of `retemper bench`; of each row the times of three rounds."""
    made = [
        {"table": table, "name": name, "ms": {"median": ms[1]}, "round_ms": ms, "reason": None}
        for name, ms in rows.items()
    ]
    return {"what": what, "device": device, "command": command, "rows": made}


def test_a_row_of_the_table_is_theirs_over_ours(tables: ModuleType, tmp_path: Path) -> None:
    kernel = {"retemper": [1.0, 2.0, 4.0], "eager chain": [3.0, 6.0, 12.0]}
    step = {"released script": [90.0, 100.0, 110.0], "+ CUDA graph": [30.0, 20.0, 11.0]}
    gpu = "cuda: NVIDIA H200"
    (tmp_path / "a.json").write_text(json.dumps(result(gpu, "kernels", "pgd_step_ fp32 21845x3x32x32", kernel)))
    (tmp_path / "b.json").write_text(json.dumps(result(gpu, "step", "ladder, resnet18 batch 128", step)))
    (tmp_path / "c.json").write_text(json.dumps(result(gpu, "loaders", "9 images", kernel, "retemper bench --quick")))
    (tmp_path / "d.json").write_text(json.dumps({"digits": 1}))
    lines = tables.table(tables.read_results(tmp_path))
    rows = [line for line in lines if "NVIDIA H200" in line]
    assert len(rows) == 2
    assert "| 20 ms | released script | 100 ms | 5.00 (3.40 to 9.00) |" in rows[0]
    assert "| 2 ms | eager chain | 6 ms | 3.00 (3.00 to 3.00) |" in rows[1]
    unmeasured = [line for line in lines if "not measured on a GPU yet" in line]
    assert len(unmeasured) == sum(headline.gpu for headline in tables.HEADLINES) - 2


def test_the_tables_of_calls_and_of_a_cpu_hold_every_kernel(tables: ModuleType, tmp_path: Path) -> None:
    cpu, kernel = "cpu: AMD EPYC, 1 threads", {"retemper": [1.0, 2.0, 4.0], "eager chain": [0.5, 1.0, 2.0]}
    host = kernel | {"the operators alone": [0.5, 0.9, 2.0]}
    named = {"class_sums fp32 128x10": kernel, "host time, class_sums": host, "first call, class_sums": kernel}
    parts = [result(cpu, "kernels", table, rows) for table, rows in named.items()]
    (tmp_path / "a.json").write_text(json.dumps({**parts[0], "rows": [row for part in parts for row in part["rows"]]}))
    gpu = result("cuda: NVIDIA H200", "kernels", "host time, class_sums", host)
    gpu["rows"][0]["host_ms"] = {"median": 0.02}
    (tmp_path / "b.json").write_text(json.dumps(gpu))
    results = tables.read_results(tmp_path)
    calls, on_cpu = tables.calls_table(results)[2:], tables.cpu_table(results)[2:]
    assert calls[0] == "| `class_sums` | AMD EPYC, 1 thread | 2,000 us | 900 us | 1,000 us | 2 ms | 1 ms |"
    assert calls[1].startswith("| `class_sums` | NVIDIA H200 | 20 us |") and calls[1].endswith("| - | - |")
    assert on_cpu == ["| `class_sums fp32 128x10` | AMD EPYC, 1 thread | 2 ms | 1 ms | 0.50 (0.50 to 0.50) |"]


def test_a_file_of_results_stands_between_its_markers(tables: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "one.md").write_text("| new |\n")
    begin, end = "<!-- benchmarks/results/one.md -->", tables.END
    text = f"before\n{begin}\n| old |\n{end}\nafter\n{begin}\n{end}"
    mended = tables.with_files(text, tmp_path, {})
    assert mended == f"before\n{begin}\n| new |\n{end}\nafter\n{begin}\n| new |\n{end}"
    assert tables.with_files(mended, tmp_path, {}) == mended
    with pytest.raises(ValueError, match="needs a line"):
        tables.with_files(f"{begin}\nno end", tmp_path, {})
    with pytest.raises(ValueError, match="does not exist"):
        tables.with_files(text.replace("one", "two"), tmp_path, {})


def test_a_stale_table_is_found_and_mended(tmp_path: Path) -> None:
    (tmp_path / "benchmarks/results/of").mkdir(parents=True)
    (tmp_path / "docs/deep").mkdir(parents=True)
    (tmp_path / "benchmarks/results/of/one.md").write_text("| new |\n")
    (tmp_path / "README.md").write_text("before\n<!-- benchmarks/results/speed.md -->\nold\n<!-- / -->\nafter\n")
    page = tmp_path / "docs/deep/page.md"
    page.write_text("<!-- benchmarks/results/of/one.md -->\n| old |\n<!-- / -->\n")
    stale = run_tables("--root", str(tmp_path), "--check")
    assert stale.returncode == 1
    assert all(name in stale.stderr for name in ("README.md", "docs/deep/page.md", "benchmarks/results/speed.md"))
    assert "| old |" in page.read_text()
    assert run_tables("--root", str(tmp_path)).returncode == 0
    assert run_tables("--root", str(tmp_path), "--check").returncode == 0
    assert page.read_text() == "<!-- benchmarks/results/of/one.md -->\n| new |\n<!-- / -->\n"
    speed, text = (tmp_path / "benchmarks/results/speed.md").read_text(), (tmp_path / "README.md").read_text()
    assert speed.startswith("| what | device |") and "not measured on a GPU yet" in speed
    assert text == f"before\n<!-- benchmarks/results/speed.md -->\n{speed}<!-- / -->\nafter\n"
