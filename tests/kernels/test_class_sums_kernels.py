"""How the launches of the sums by class are cut into programs; what they sum is in test_class_sums.py."""

import pytest
import torch

from retemper.kernels import class_sums_kernels as kernels


@pytest.mark.parametrize(("classes", "block", "tall"), [(3, 4, 512), (10, 16, 128), (32, 32, 64), (1000, 32, 64)])
def test_a_program_looks_at_as_many_rows_as_its_classes_leave_room_for(classes: int, block: int, tall: int) -> None:
    assert kernels.sum_tiles(classes) == {"K": classes, "BLOCK": block, "TALL": tall}


def test_a_launch_has_a_program_for_each_part() -> None:
    logits, label = torch.zeros(300, 10), torch.zeros(300, dtype=torch.int64)
    assert kernels._prepared_sums(logits, label, *kernels.room(logits, (10,))).grid == (1,)
    assert kernels._prepared_sums(logits, label, *kernels.room(logits, (3, 10))).grid == (3,)
    parts = kernels.room(logits, (3, 100))
    assert kernels._prepared_slices(label, logits, label, *parts).grid == (4, 3)
    assert kernels._prepared_total(*parts, *kernels.room(logits, (100,))).named["parts"] == 3
    assert kernels._prepared_rows(logits[:0], label[:0]) is None
    with pytest.raises(ValueError, match="label"):
        kernels._prepared_sums(logits, label[:5], *kernels.room(logits, (10,)))
