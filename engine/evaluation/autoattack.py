"""AutoAttack's standard suite (Croce & Hein, ICML 2020), run by the library itself: the extra `eval`."""

import numpy as np
import torch
from torch import Tensor, nn

from retemper.engine.attack import predicts
from retemper.engine.evaluation.evaluate import as_float, exact_fp32
from retemper.loaders import Split
from retemper.loaders.errors import UsageError
from retemper.loaders.progress import say


class ChannelsLast(nn.Module):
    """`model` for a caller that must see contiguous tensors: APGD-T of the library views its input as flat rows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image.contiguous(memory_format=torch.channels_last))


def autoattack_survivors(
    model: nn.Module,
    split: Split,
    *,
    eps: float,
    indices: np.ndarray,
    device: torch.device,
    batch_size: int,
    seed: int,
) -> Tensor:
    """Which images every attack of the suite leaves correctly classified: (N,) bool on the host.

    Raises:
        UsageError: the library is not installed.
    """
    try:
        from pyautoattack import AutoAttack
    except ImportError:
        raise UsageError("AutoAttack is not installed: pip install 'retemper[eval]'") from None
    wrapped = ChannelsLast(model).eval()
    clean = as_float(split, torch.from_numpy(indices), device).contiguous()
    label_N = torch.from_numpy(split.labels[indices]).to(device)
    say(f"autoattack: standard suite on {len(indices)} images; it shows no progress and takes a while")
    with exact_fp32():
        suite = AutoAttack(wrapped, eps=eps, norm="Linf", version="standard", seed=seed, device=str(device))
        adv, _ = suite.run_standard_evaluation(clean, label_N, batch_size=batch_size)
        return _correct(wrapped, clean, label_N, batch_size) & _correct(wrapped, adv, label_N, batch_size)


@torch.no_grad()
def _correct(model: nn.Module, image: Tensor, label_N: Tensor, batch_size: int) -> Tensor:
    """(N,) bool on the host."""
    parts = zip(image.split(batch_size), label_N.split(batch_size), strict=True)
    return torch.cat([predicts(model(part), label) for part, label in parts]).cpu()
