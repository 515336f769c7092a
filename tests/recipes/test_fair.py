"""Fair-ARD's class weights."""

import json
from pathlib import Path

import pytest
import torch

from retemper.recipes.fair import class_weight

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/recipes.json").read_text())["class_weight"]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"K={len(case['kappa'])}")
def test_weights_are_the_known_ones(case: dict) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        weight = class_weight(torch.tensor(case["kappa"], dtype=dtype), case["beta"])
        torch.testing.assert_close(weight.double().tolist(), case["weight"], rtol=tolerance, atol=0)


def test_a_class_never_classified_correctly_weighs_most_and_finitely() -> None:
    weight = class_weight(torch.tensor([0.0, 5.0, 9.0]))
    assert weight.tolist() == pytest.approx([2.5, 5 / 6, 5 / 6])


def test_refuses_a_batch_of_difficulties() -> None:
    with pytest.raises(ValueError, match="kappa_K"):
        class_weight(torch.ones(2, 3))
