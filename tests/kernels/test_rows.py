"""The arguments of a loss over rows: what is a view, what is copied, and what is refused."""

import math

import pytest
import torch

from retemper.kernels.rows import as_rows, by_row, require_each, require_logits, require_positive, row_shapes


def test_classes_that_come_last_are_a_view() -> None:
    logits = torch.arange(24.0).view(2, 3, 4)
    rows = as_rows(logits, -1)
    assert rows.shape == (6, 4) and rows.data_ptr() == logits.data_ptr()
    assert as_rows(rows, 1) is rows
    assert row_shapes(logits, -1) == ((2, 3), (2, 3, 1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_classes_of_an_image_are_made_to_come_last(layout: torch.memory_format) -> None:
    logits = torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=layout)
    rows = as_rows(logits, 1)
    assert torch.equal(rows, logits.permute(0, 2, 3, 1).reshape(40, 3)) and rows.stride(1) == 1
    assert (rows.data_ptr() == logits.data_ptr()) == (layout == torch.channels_last)
    assert row_shapes(logits, 1) == ((2, 4, 5), (2, 1, 4, 5))
    assert row_shapes(logits, -3) == row_shapes(logits, 1)


def test_a_single_image_is_copied_though_a_view_would_have_its_shape() -> None:
    logits = torch.rand(1, 3, 4, 5)
    assert as_rows(logits, 1).stride(1) == 1


def test_numbers_of_rows_take_both_shapes() -> None:
    shapes = row_shapes(torch.zeros(2, 3, 4), -1)
    for shape in ((2, 3), (2, 3, 1)):
        assert by_row("weight", torch.zeros(shape), shapes).shape == (6,)
    with pytest.raises(ValueError, match=r"weight: shape \(6,\); needs \(2, 3\), one number for each row"):
        by_row("weight", torch.zeros(6), shapes)
    with pytest.raises(TypeError, match="weight: a float; needs a tensor"):
        by_row("weight", 1.0, shapes)  # type: ignore[arg-type]


def test_refuses_in_words() -> None:
    for number in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"^temperature: {number}; needs a finite number above 0"):
            require_positive(temperature=number)
    rows = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="teacher: on meta, but student is on cpu"):
        require_logits(student=rows, teacher=rows.to("meta"))
    with pytest.raises(ValueError, match="weight: on meta, but the logits are on cpu"):
        require_each("weight", torch.zeros(2, device="meta"), 2, (torch.float32,), rows.device)
