"""Progress: in plain lines where nobody watches a terminal, and never part of the output."""

from types import SimpleNamespace

import pytest

from retemper import console as module
from retemper.console import Progress, duration, progress


def test_lines_come_now_and_then_on_stderr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINE_EVERY_S", 20.0)
    clock = iter(range(0, 1000, 12))  # each look at it is 12 s later
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert list(progress(range(5), 5, "reading")) == [0, 1, 2, 3, 4]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["reading: 5 to do", "reading: 2 of 5, 36 s left", "reading: 4 of 5, 12 s left"]


def test_silence_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(iter("ab"), 2, "reading", show=False)) == ["a", "b"]
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(progress("ab", 2, "reading")) == ["a", "b"]
    assert "reading:" in capsys.readouterr().err


def test_times_are_readable() -> None:
    times = {41.6: "42 s", 725: "12 min 05 s", 3599.6: "1 h 00 min", 3900: "1 h 05 min", 183600: "2 d 03 h"}
    assert {seconds: duration(seconds) for seconds in times} == times


def test_what_was_done_before_does_not_count_as_fast(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINE_EVERY_S", 20.0)
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with Progress("epoch", 100, done=80, whole=lambda: 3900.0) as shown:
        shown.advance(10)
    assert capsys.readouterr().err == "epoch: 90 of 100, 20 s left, 1 h 05 min of the whole run\n"
