"""The unattended GPU suite names things that exist, and the documents' tables are what the committed results say."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from retemper.arguments import command_line
from retemper.bench.step_phases import PHASES
from retemper.bench.step_variants import ADDITIONS, OTHERWISE
from retemper.loaders import load_split

ROOT = Path(__file__).resolve().parents[2]
SUITE = ROOT / "benchmarks/gpu_suite.sh"


def test_the_suite_is_shell() -> None:
    for script in (SUITE, ROOT / "benchmarks/gpu_rehearsal.sh"):
        subprocess.run(["bash", "-n", script], check=True)


def listed(which: str, results: Path) -> dict[str, tuple[int, str]]:
    """The planned seconds and the command of each part of one command of the suite."""
    env = {"PATH": os.environ["PATH"], "SUITE_LIST": "1", "PYTHON": "python3", "RESULTS": str(results)}
    told = subprocess.run(["bash", SUITE, which], env=env, capture_output=True, text=True, check=True)
    lines = [line for line in told.stdout.splitlines() if re.match(r"\w+ \d+ s: ", line)]
    heads = [line.split(" s: ", 1) for line in lines]
    return {head.split()[0]: (int(head.split()[1]), command) for head, command in heads}


def test_every_part_of_the_suite_is_a_command_that_exists(tmp_path: Path) -> None:
    parts = {which: listed(which, tmp_path) for which in ("1", "2", "more")}
    assert not list(tmp_path.iterdir()), "a list runs nothing"
    assert [*parts["1"]][:4] == ["nvidia_smi", "rates", "kernels", "step_resnet18"]
    assert {"tests_kernels", "sat", "absld", "absld_pgd20"} <= parts["2"].keys()
    assert {"sweep_kl", "loaders", "digits", "step_resnet18_1024", "sanitizer", "ranks"} <= parts["more"].keys()
    for name, (_, command) in {**parts["1"], **parts["2"], **parts["more"]}.items():
        words = shlex.split(command.replace("@seconds", "9"))
        if words[0] == "compute-sanitizer":
            words = words[words.index("python3") :]
        if words[:3] == ["python3", "-m", "retemper"]:
            command_line(words[4] if words[3] == "train" else None)[0].parse_args(words[3:])
        elif words[:3] == ["python3", "-m", "pytest"]:
            assert all((ROOT / word).exists() for word in words if word.startswith("tests/")), name
        elif words[:2] != ["python3", "-c"] and words[:3] != ["python3", "-m", "torch.distributed.run"]:
            assert words[0] in ("nvidia-smi", "bash") or (ROOT / words[1]).is_file(), name


def test_the_first_two_commands_fit_a_quarter_of_an_hour(tmp_path: Path) -> None:
    planned = [sum(seconds for seconds, _ in listed(which, tmp_path).values()) for which in ("1", "2")]
    assert max(planned) <= 400 and sum(planned) <= 780, "of 900 s a machine's start takes up to 120"


def test_the_rows_that_the_suite_asks_for_are_there(tmp_path: Path) -> None:
    named = {variant.name for variant in (*ADDITIONS, *OTHERWISE)} | {"whole step", "two forwards, backward", *PHASES}
    named |= {"released script", "released, any convolution", "careful PyTorch", "careful PyTorch, torch.compile"}
    for _, command in listed("1", tmp_path).values():
        words = shlex.split(command)
        if "step" in words and "--rows" in words:
            assert set(words[words.index("--rows") + 1 :]) <= named


def suite(
    tmp_path: Path, parts: str, python: str, which: str = "more", **words: str
) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "SUITE_PARTS": parts, "PYTHON": python, "RESULTS": str(tmp_path / "results")}
    return subprocess.run(["bash", SUITE, which], env=env | words, capture_output=True, text=True)


def test_a_part_runs_once_and_a_failure_is_noted(tmp_path: Path) -> None:
    ran, fails = tmp_path / "ran", tmp_path / "python"
    fails.write_text(
        f'#!/bin/sh\ncase "$1" in -) exit 0;; *) echo run >> {shlex.quote(str(ran))}; exit ${{CODE:-3}};; esac\n'
    )
    fails.chmod(0o755)
    told = suite(tmp_path, "kernels_images loaders", str(fails))
    assert told.returncode == 1 and "failed: kernels_images loaders" in told.stdout
    assert ran.read_text() == "run\nrun\n" and not (tmp_path / "results/done.txt").exists()
    out = tmp_path / "out"
    for _ in range(2):
        assert suite(tmp_path, "loaders", str(fails), CODE="0", OUT=str(out)).returncode == 0
    done = (tmp_path / "results/done.txt").read_text()
    assert ran.read_text() == "run\n" * 3 and done.startswith("loaders ")
    assert [path.name for path in out.iterdir()] == ["gpu_suite.tar.gz"]
    with tarfile.open(out / "gpu_suite.tar.gz") as archive:
        assert {"./done.txt", "./loaders.txt", "./kernels_images.txt"} <= set(archive.getnames())


def test_a_part_that_the_time_does_not_hold_is_left(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$1" in -) exit 0;; *) exec sleep 60;; esac\n')
    python.chmod(0o755)
    (tmp_path / "cifar-10-batches-bin").mkdir()
    parts, words = "sat wrn34_10 absld_wrn34_10", {"SUITE_SECONDS": "6", "CIFAR10": str(tmp_path)}
    told = suite(tmp_path, parts, str(python), "2", **words)
    assert told.returncode == 1 and "failed: wrn34_10\n" in told.stdout, "it is stopped with the command's time"
    assert "left for another call of the same command: sat absld_wrn34_10\n" in told.stdout


def test_a_result_that_was_cut_short_is_not_done(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    row = {"table": "x", "name": "a", "exactness": "bitwise", "reason": None}
    for complete, reason, code in ((True, None, 0), (False, None, 1), (True, "disagrees: by 1", 1)):
        result = {"complete": complete, "rows": [row | {"reason": reason}]}
        (tmp_path / "results/loaders.json").write_text(json.dumps(result))
        (tmp_path / "results/done.txt").unlink(missing_ok=True)
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\ncase "$1" in -) exec {sys.executable} "$@";; *) exit 0;; esac\n')
        python.chmod(0o755)
        assert suite(tmp_path, "loaders", str(python)).returncode == code, result


def test_jpeg_copies_are_read_as_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = loaded("gpu_images")
    monkeypatch.setattr(images, "COUNTS", {"train": 10, "test": 2})
    for split, count in images.COUNTS.items():
        for number in range(count):
            folder = tmp_path / "source" / split / images.CLASSES[number % 10]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (25 * number, 0, 255)).save(folder / f"{number}.jpg")
    with tarfile.open(tmp_path / "source.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "source", ".")
    for source in ("source", "source.tar.xz"):
        monkeypatch.setattr(sys, "argv", ["gpu_images.py", str(tmp_path / source), str(tmp_path / f"of {source}")])
        images.main()
        split = load_split("cifar10", "train", tmp_path / f"of {source}")
        assert sorted(split.labels) == list(range(10)) and split.classes == tuple(images.CLASSES)
        for pixels, label in zip(split.images, split.labels, strict=True):
            assert abs(pixels.astype(int) - (25 * label, 0, 255)).max() < 12, "JPEG is not exact"
    (tmp_path / "source/test/airplane/0.jpg").unlink()
    monkeypatch.setattr(sys, "argv", ["gpu_images.py", str(tmp_path / "source"), str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="1 test images in class folders, not 2"):
        images.main()


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return loaded("tables")


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
    step |= {"careful PyTorch": [40.0, 40.0, 33.0], "+ table, every view known": [10.0, 10.0, 10.0]}
    gpu = "cuda: NVIDIA H200"
    (tmp_path / "a.json").write_text(json.dumps(result(gpu, "kernels", "pgd_step_ fp32 21845x3x32x32", kernel)))
    (tmp_path / "b.json").write_text(json.dumps(result(gpu, "step", "ladder, resnet18 batch 128", step)))
    (tmp_path / "c.json").write_text(json.dumps(result(gpu, "loaders", "9 images", kernel, "retemper bench --quick")))
    (tmp_path / "d.json").write_text(json.dumps({"digits": 1}))
    lines = tables.table(tables.read_results(tmp_path))
    rows = [line for line in lines if "NVIDIA H200" in line]
    assert len(rows) == 5
    assert "ResNet-18, batch 128 | NVIDIA H200 | 20 ms | released script | 100 ms | 5.00 (3.40 to 9.00) |" in rows[0]
    assert "| 20 ms | careful PyTorch | 40 ms |" in rows[1]
    assert "teacher's table full | NVIDIA H200 | 10 ms | released script | 100 ms |" in rows[2]
    assert "| 2 ms | eager chain | 6 ms | 3.00 (3.00 to 3.00) |" in rows[4]
    unmeasured = [line for line in lines if "not measured on a GPU yet" in line]
    assert len(unmeasured) == sum(headline.gpu for headline in tables.HEADLINES) - 2
    rehearsed = result(
        gpu, "step", "ladder, resnet18 batch 128", {"released script": [1.0] * 3, "+ CUDA graph": [1.0] * 3}
    )
    (tmp_path / "e.json").write_text(json.dumps(rehearsed | {"checked": False}))
    assert tables.table(tables.read_results(tmp_path)) == lines, "a rehearsal has no numbers"


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


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere", "No such file"),
        ("no.tar", "could not be opened"),
        ("folder", "train/cat/a.jpg is no image, or cut off"),
    ],
)
def test_images_that_cannot_be_read_are_named_in_a_line(
    source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no.tar").write_text("not an archive")
    (tmp_path / "folder/train/cat").mkdir(parents=True)
    (tmp_path / "folder/train/cat/a.jpg").write_text("not an image")
    monkeypatch.setattr(sys, "argv", ["gpu_images.py", str(tmp_path / source), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        loaded("gpu_images").main()
    assert words in str(stopped.value) and source in str(stopped.value) and "\n" not in str(stopped.value)
    assert not (tmp_path / "out").exists()
