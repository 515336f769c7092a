"""Tables of addresses: made once, anew for what moved, and gone with what they serve."""

import gc

import pytest
import torch
from torch import Tensor

from retemper.kernels.tables import Row, Tables, one_launch


def counted() -> tuple[Tables, list[int]]:
    """Tables of addresses and the number in `also`, and how often one was made."""
    made = []

    def rows(one: list[Tensor], two: list[Tensor], also: tuple[int, ...] = ()) -> list[Row]:
        made.append(1)
        return [(a.data_ptr(), b.data_ptr(), *also) for a, b in zip(one, two, strict=True)]

    return Tables(rows), made


def test_a_table_is_made_once_and_anew_for_what_moved(device: torch.device) -> None:
    tables, made = counted()
    one, two = ([torch.zeros(3, device=device) for _ in range(4)] for _ in range(2))
    table = tables(one, two, also=(7,))
    assert table.device == one[0].device and table.dtype is torch.int64
    assert table.tolist() == [[a.data_ptr(), b.data_ptr(), 7] for a, b in zip(one, two, strict=True)]
    assert tables(one, two, also=(7,)) is table and len(made) == 1  # where it lies is where a captured launch looks
    assert tables(one, two, also=(8,)).tolist()[0][2] == 8
    two[2] = two[2].clone()
    assert tables(one, two, also=(7,)).tolist()[2][1] == two[2].data_ptr()
    assert len(made) == 3


def test_a_table_goes_with_its_first_tensor(device: torch.device) -> None:
    tables, _ = counted()
    one, two = [torch.zeros(1, device=device)], [torch.zeros(1, device=device)]
    tables(one, two)
    assert len(tables.made) == 1
    del one
    gc.collect()
    assert len(tables.made) == 0


def test_one_launch_takes_lists_of_one_dtype_each(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    wide, half = torch.zeros(1, device=device), torch.zeros(1, device=device).half()
    monkeypatch.setattr("retemper.kernels.tables.runs_triton", lambda *given: True)
    assert one_launch([wide, wide], [half]) and not one_launch([wide, half])
