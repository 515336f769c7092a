"""What a user types and nothing heeds is said, or refused."""

from pathlib import Path

import pytest

from retemper.cli import run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--attack", "nfgsm", "--attack-steps", "5"], "so --attack-steps changes nothing"),
        (["--attack", "pgd2", "--attack-start", "none"], "so --attack-start changes nothing"),
        (["--average", "swa", "--ema-warmup", "true"], "--ema-warmup is of --average ema"),
        (["--attack-steps", "5"], ""),
        (["--average", "ema", "--ema-warmup", "true"], ""),
    ],
)
def test_an_option_without_effect_is_told(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "sat:digits", *words, "--show"]) == 0
    out, err = capsys.readouterr()
    assert said in out + err if said else "changes nothing" not in out + err


def test_a_seed_for_what_draws_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for by in ([], ["--by", "bias"]):
        assert run(["even", str(tmp_path), *by, "--seed", "3"]) == 2
        assert capsys.readouterr().err.strip() == (
            "retemper: error: --seed is of a fine-tune: give it with --by csr or plain, nothing else is drawn"
        )
