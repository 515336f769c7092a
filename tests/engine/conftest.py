"""What the engine's tests share: runs in processes of their own, to be killed."""

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

LIMIT_S = 600.0  # a process that takes longer hangs, on a slow and busy machine too


class Process:
    """A fork of this process, which has imported everything already, that runs `retemper WORDS`."""

    def __init__(self, words: list[str], log: Path, prepare: Callable[[], object]) -> None:
        self.log = log
        log.touch()
        sys.stdout.flush()
        with warnings.catch_warnings():  # from Python 3.12 on a fork beside threads warns
            warnings.simplefilter("ignore")
            self.pid = os.fork()
        if not self.pid:
            self._become(words, prepare)
        self.code: int | None = None

    def _become(self, words: list[str], prepare: Callable[[], object]) -> None:
        """Run the command as the console script does; never return."""
        from retemper import interrupts
        from retemper.cli import run

        try:
            with open(self.log, "w", buffering=1) as sys.stderr, open(os.devnull, "w") as sys.stdout:
                prepare()
                interrupts.install()
                code = run(words)
        except BaseException:
            self.log.write_text(traceback.format_exc())
            code = 99
        os._exit(code)

    def wait(self) -> tuple[int, str]:
        """Return the exit code, or minus the signal that killed the process, and its standard error."""
        end = time.monotonic() + LIMIT_S
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"it hangs: {self.log.read_text()}")
            else:
                time.sleep(0.002)
        return self.code, self.log.read_text()

    def send(self, number: int) -> tuple[int, str]:
        """Send a signal, then `wait`."""
        os.kill(self.pid, number)
        return self.wait()

    def until(self, happened: Callable[[], bool]) -> None:
        """Return as soon as something has happened while the process runs."""
        end = time.monotonic() + LIMIT_S
        while not happened():
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            assert not pid, f"it ended first ({os.waitstatus_to_exitcode(status)}): {self.log.read_text()}"
            assert time.monotonic() < end, f"nothing happened: {self.log.read_text()}"
            time.sleep(0.002)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start `retemper WORDS`; `prepare` is called in the new process first. What still runs in the end is killed."""
    started: list[Process] = []

    def start_it(*words: object, prepare: Callable[[], object] = lambda: None) -> Process:
        started.append(Process([str(word) for word in words], tmp_path / f"log{len(started)}", prepare))
        return started[-1]

    yield start_it
    for process in started:
        if process.code is None:
            try:
                process.send(signal.SIGKILL)
            except ChildProcessError:
                pass
