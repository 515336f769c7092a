"""The kernel of strong views: the bits of the reference."""

from typing import Any

import pytest
import torch

from retemper.kernels import strong_augment, strong_augment_reference
from retemper.kernels.view_draws import POLICIES

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_both_paths_agree(policy: str, padding_mode: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    view = torch.randint(2**63 - 1, (12,), generator=generator)
    view[0] = -1
    for shape, more in (((7, 9, 11, 3), {}), ((7, 5, 4, 1), {"flip": False, "cutout": 3})):
        index = torch.arange(12) % 9 - 1  # some out of range: clamped
        image = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)
        given = image, view.to(device)
        how: dict[str, Any] = {"policy": policy, "padding_mode": padding_mode, "padding": 3, "index": index.to(device)}
        out = strong_augment(*given, **how, **more)
        assert torch.equal(out, strong_augment_reference(*given, **how, **more))
        assert torch.equal(out[0].cpu(), image[0].cpu().permute(2, 0, 1) / 255)  # a view below 0
