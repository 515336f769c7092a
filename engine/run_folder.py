"""A run's folder: what is written there, in what order, and how a run goes on after it was killed.

Every file is replaced atomically, and `last.state` is written last in an epoch: whatever the moment of a kill, it names
an epoch whose weights, class state and score are whole, and lines of `metrics.jsonl` beyond it are dropped on resume.
"""

import fcntl
import io
import json
import pickle
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from retemper.engine.moves import EXACTNESS
from retemper.engine.weights import save_weights, write_atomically
from retemper.loaders.errors import DataError, UsageError

CONFIG = {"method": str, "setting": str, "recipe": dict, "seed": int, "classes": list, "teacher": dict | None}


class RunFolder:
    """The files of one run, under `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.metrics = path / "config.json", path / "metrics.jsonl"
        self.last, self.best, self.state = path / "last.safetensors", path / "best.safetensors", path / "last.state"
        self.evaluation = path / "evaluation.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, made if need be, for this process; the kernel lets go of it however the process ends."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "w")
        except OSError as error:
            raise UsageError(
                f"cannot write to {self.path} ({error.strerror}): name another folder with --out"
            ) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"another process is writing to {self.path}: wait for it or name another --out"
                ) from None
            yield

    def read_config(self) -> dict[str, Any]:
        """The run's config.json.

        Raises:
            DataError: it is not there, or is not what a run writes.
        """
        config = read_json(self.config)
        for name, kind in CONFIG.items():
            if not isinstance(config.get(name), kind):
                raise DataError(f"{self.config} is damaged (no {name}): delete the folder to start the run anew")
        for name in ("student", "dataset", "eps"):
            if name not in config["recipe"]:
                raise DataError(f"{self.config} is damaged (no {name}): delete the folder to start the run anew")
        return config

    def begin(self, config: dict[str, Any]) -> None:
        """Write the config, or check that the run found here is the same one.

        Raises:
            UsageError: the folder holds a run of another recipe, seed or teacher.
        """
        config = json.loads(json.dumps(config))  # tuples become lists, as in the file
        if not self.config.exists():
            if self.state.exists():
                raise DataError(f"{self.path} holds a run without its config.json: name another folder with --out")
            write_atomically(self.config, json.dumps(config, indent=2).encode() + b"\n")
            return
        differing = _differences(self.read_config(), config)
        if differing:
            raise UsageError(
                f"{self.path} holds another run ({'; '.join(differing)}): "
                "repeat its own options to go on with it, or name another folder with --out"
            )

    def save_epoch(
        self, line: dict[str, Any], student: nn.Module, metadata: dict[str, str], state: dict[str, Any]
    ) -> None:
        """Write one epoch: its metrics line, the weights, and at last the state that resuming reads."""
        self._write_metrics([*self._read_metrics(line["epoch"] - 1), line])
        save_weights(self.last, student, metadata)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.state, buffer.getvalue())

    def load_state(self) -> dict[str, Any] | None:
        """What `save_epoch` was last given, its metrics lines trimmed to that epoch; None for a run not yet begun."""
        if not self.state.exists():
            self._write_metrics([])
            return None
        try:
            state = torch.load(self.state, map_location="cpu", weights_only=True)
            missing = {"epoch", "student", "optimizer", "scaler", "class_state", "best"} - state.keys()
            if missing:
                raise KeyError(missing)
        except (RuntimeError, EOFError, KeyError, AttributeError, ValueError, pickle.UnpicklingError) as error:
            raise DataError(
                f"{self.state} is damaged ({type(error).__name__}): delete the folder to start the run anew"
            ) from None
        self._write_metrics(self._read_metrics(state["epoch"]))
        return state

    def _read_metrics(self, last: int) -> list[dict[str, Any]]:
        """The lines up to epoch `last`; one that cannot be read is left out."""
        lines = []
        for text in self.metrics.read_text().splitlines() if self.metrics.exists() else []:
            try:
                line = json.loads(text)
                if line["epoch"] <= last:
                    lines.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        return lines

    def _write_metrics(self, lines: list[dict[str, Any]]) -> None:
        write_atomically(self.metrics, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DataError: no such file, or not one JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: is {path.parent} the folder of a run?") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} should hold one JSON object")
    return content


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What makes `new` another run than `old`, as "field: old, now new"."""
    before = {**old["recipe"], **{name: old.get(name) for name in ("method", "seed")}}
    after = {**new["recipe"], **{name: new[name] for name in ("method", "seed")}}
    for what in ("teacher", "clean_teacher", "start"):
        before[what], after[what] = ((config.get(what) or {}).get("sha256", "none") for config in (old, new))
    names = [name for name in after if before.get(name) != after[name] and EXACTNESS.get(name) != "bitwise"]
    return [f"{name}: {before.get(name)}, now {after[name]}" for name in names]


def versions() -> dict[str, str]:
    """Of retemper, torch, triton and Python."""
    import platform

    import triton

    from retemper import __version__

    return {
        "retemper": __version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """The commit that this module's source is checked out at; None where git does not track it."""

    def git(*words: str) -> str:
        answer = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)
        return answer.stdout.strip() if answer.returncode == 0 else ""

    here = Path(__file__).resolve().parent
    return git("rev-parse", "HEAD") or None if shutil.which("git") and git("ls-files", Path(__file__).name) else None


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"cpu: {line.partition(':')[2].strip()}, {torch.get_num_threads()} threads"
    return "cpu"
