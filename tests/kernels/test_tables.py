"""Tables of addresses: made once, anew for what moved, and gone with what they serve."""

import gc

import pytest
import torch
from torch import Tensor

from retemper.kernels.tables import Row, Tables, lie_alike


def counted() -> tuple[Tables, list[int]]:
    """Tables of addresses and the number in `also`, and how often one was made."""
    made = []

    def rows(one: list[Tensor], two: list[Tensor], also: tuple[int, ...] = ()) -> list[Row]:
        made.append(1)
        return [(a.data_ptr(), b.data_ptr(), *also) for a, b in zip(one, two, strict=True)]

    return Tables(rows), made


@pytest.mark.triton
def test_a_table_is_made_once_and_anew_for_what_moved(device: torch.device) -> None:
    tables, made = counted()
    one, two = ([torch.zeros(3, device=device) for _ in range(4)] for _ in range(2))
    table = tables(one, two, also=(7,))
    assert table is not None and table.device == one[0].device and table.dtype is torch.int64
    assert table.tolist() == [[a.data_ptr(), b.data_ptr(), 7] for a, b in zip(one, two, strict=True)]
    assert tables(one, two, also=(7,)) is table and len(made) == 1  # where it lies is where a captured launch looks
    two[2] = two[2].clone()
    table = tables(one, two, also=(7,))
    assert table is not None and table.tolist()[2][1] == two[2].data_ptr()
    assert tables(one, two, also=(8,)) is not table and len(made) == 3


@pytest.mark.triton
def test_a_table_goes_with_its_first_tensor(device: torch.device) -> None:
    tables, _ = counted()
    one, two = [torch.zeros(1, device=device)], [torch.zeros(1, device=device)]
    tables(one, two)
    assert len(tables.made) == 1
    del one
    gc.collect()
    assert len(tables.made) == 0


@pytest.mark.triton
def test_there_is_none_for_several_dtypes_odd_layouts_and_plain_pytorch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, _ = counted()
    wide, half = torch.zeros(1, device=device), torch.zeros(1, device=device).half()
    assert tables([wide, wide], [half, half]) is not None
    assert tables([wide, wide], [wide, half]) is None
    assert tables([wide.double()], [wide]) is None
    assert Tables(lambda *_: None)([wide], [wide]) is None
    monkeypatch.setattr("retemper.kernels.tables.runs_triton", lambda *_: False)
    assert tables([wide, wide], [half, half]) is None


def test_what_lies_alike_has_one_order_without_holes() -> None:
    image = torch.zeros(4, 3, 5, 5)
    last = image.to(memory_format=torch.channels_last)
    assert lie_alike(image, image.clone()) and lie_alike(last, last.half()) and lie_alike(image[0, 0, 0, 0])
    assert lie_alike(torch.empty_strided((4, 3, 1, 1), (3, 1, 1, 1)), torch.empty_strided((4, 3, 1, 1), (3, 1, 3, 3)))
    assert not lie_alike(image, last) and not lie_alike(image[:, :, ::2], image[:, :, ::2])
    assert not lie_alike(image, image[:2]) and not lie_alike(image.transpose(0, 1), image.transpose(0, 1))
