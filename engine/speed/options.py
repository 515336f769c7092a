"""What makes a step fast: each move can be switched alone, and none of them changes the algorithm.

EXACTNESS says what each costs in digits, and a test proves it: "bitwise", "rounding" (the same formula, another order
of operations) or "lower precision". A speed-up that changes the algorithm (fewer steps, skipped samples) is not one.
"""

from dataclasses import dataclass
from typing import Literal

import torch

EXACTNESS = {
    "precision": "lower precision",
    "channels_last": "rounding",
    "fold": "rounding",
    "epilogue": "rounding",
    "pad_stem": "rounding",
    "capture": "bitwise",
    "teacher_ahead": "rounding",
    "teacher_table": "rounding",
    "fused_sgd": "rounding",
}


@dataclass(frozen=True, kw_only=True)
class Moves:
    """Attributes:
    precision: "auto" is bf16 on a GPU that has it, fp32 on a CPU, where that is faster; "fp32" switches TF32 off.
    channels_last: networks and images in NHWC. Random starts are drawn in the order of memory, so that of images with
        more than one channel is another draw.
    fold: the attack and the teacher see batch norm folded into the convolutions, where the attack runs in eval mode.
    epilogue: of the folded convolutions, bias + shortcut + ReLU: "plain" PyTorch, one "fused" kernel, or the network
        "compiled"; "auto" is fused on a GPU and plain on a CPU.
    pad_stem: the folded stem sees 4 channels, the added ones zero. Not measured yet, so not the default.
    capture: the step is recorded in a CUDA graph; "auto" is on where there is a GPU, with the fused optimizer.
    teacher_ahead: the teacher answers so many batches at once, between steps; 0 asks it within each step.
    teacher_table: its answers to every view are kept on disk and asked for once; "auto" is on up to 4 GiB.
    fused_sgd: the optimizer's step is one kernel.
    """

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    channels_last: bool = True
    fold: bool = True
    epilogue: Literal["auto", "plain", "fused", "compiled"] = "auto"
    pad_stem: bool = False
    capture: Literal["auto", "on", "off"] = "auto"
    teacher_ahead: int = 8
    teacher_table: Literal["auto", "on", "off"] = "auto"
    fused_sgd: bool = True

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """What networks compute in."""
        if self.precision != "auto":
            return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32

    def epilogue_on(self, device: torch.device) -> str:
        """ "plain", "fused" or "compiled"."""
        if self.epilogue != "auto":
            return self.epilogue
        return "fused" if device.type == "cuda" else "plain"

    def captures_on(self, device: torch.device) -> bool:
        """Whether steps are recorded and replayed.

        Raises:
            ValueError: capture is asked for where it is not possible.
        """
        possible = device.type == "cuda" and self.fused_sgd  # of the optimizers, the fused one reads its rate there
        if self.capture == "on" and not possible:
            raise ValueError("capture = 'on': CUDA graphs need a GPU, and fused_sgd; leave it at 'auto'")
        return self.capture != "off" and possible
