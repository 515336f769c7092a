"""No number that a user gives is accepted where it cannot be meant."""

from typing import get_args

import pytest

from retemper.cli import run
from retemper.engine.catalogue import method_module, methods

BOUNDED = [
    ("train sat:digits --cpu-threads 5000", "cpu_threads = 5000: it must lie above 0, at most 512"),
    ("train absld:digits --temperature-rate 1e9", "temperature_rate = 1000000000.0: it must lie between 0 and 100"),
    ("train absld:digits --manual-temperatures 1,0", "manual_temperatures = 0.0: it must be above 0"),
    ("train sat:digits --lr-drops 1,70000", "lr_drops = 70000: it must lie between 0 and 65535"),
    ("train sat:digits --epochs 99999999999999999999999", "it must lie above 0, at most 65535"),
    ("train fair_ard:digits --weight-lower 3", "weight_lower = 3.0: it must be at most weight_upper = 2.5"),
    ("train frl:digits --margin-lower 4", "margin_lower = 4.0: it must be at most margin_upper = 3.0"),
    ("train b_mtard:digits --temperature-lower 11", "temperature_lower = 11.0: it must be at most temperature_upper"),
    ("train sat:digits --save-every nan", "--save-every nan: write it in seconds"),
    ("train sat:digits --save-every=-1", "--save-every -1: write it in seconds"),
    ("train sat:digits --out=", "--out '': name a file or a folder"),
    ("evaluate x --budget inf", "--budget inf: write it in minutes"),
    ("evaluate x --batch-size 9999999999", "--batch-size 9999999999: a batch has"),
    ("convert digits --out x.beton --image-size -3", "--image-size -3: an image has"),
]


@pytest.mark.parametrize(("words", "said"), BOUNDED)
def test_a_number_out_of_its_range_is_refused_with_the_range(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words.split()) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("method", methods())
def test_every_number_of_a_recipe_has_a_bound(method: str) -> None:
    for setting in method_module(method).SETTINGS.values():
        for name, (_, one) in setting.recipe.options().items():
            kinds = {one.kind, *get_args(one.kind)}
            assert not kinds & {int, float} or one.at_most is not None, name
