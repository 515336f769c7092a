"""Options that make a step fast. Each can be switched alone, and none of them changes the algorithm.

`EXACTNESS` says how far each may move the result, and tests hold it: "bitwise" (not at all), "rounding" (the same
formula in another order of operations) or "lower precision".
"""

from dataclasses import dataclass
from typing import Literal

import torch

from retemper.options import Options, option

EXACTNESS = {
    "precision": "lower precision",
    "channels_last": "rounding",
    "fold": "rounding",
    "epilogue": "rounding",
    "together": "rounding",
    "capture": "bitwise",
    "teacher_ahead": "rounding",
    "teacher_table": "rounding",
    "fused_sgd": "rounding",
    "beside": "bitwise",
    "kept": "bitwise",
    "extra_on": "bitwise",
}


@dataclass(frozen=True, kw_only=True)
class Execution(Options):
    """The options of execution: of the training step, and of the place where the images lie."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "what networks compute in: auto is bf16 on a GPU that has it, fp32 elsewhere; fp32 switches TF32 off"
    )
    channels_last: bool = option(True, "networks and images in NHWC; random starts of colour images are other draws")
    fold: bool = option(True, "show the attack and the teacher batch norm folded into the convolutions")
    epilogue: Literal["auto", "plain", "fused", "convolution", "compiled"] = option(
        "auto",
        "bias, shortcut and ReLU of folded convolutions: plain PyTorch, one kernel, cuDNN's call of the "
        "convolution where it has one, or torch.compile; auto is convolution on a GPU, plain elsewhere",
    )
    together: Literal["auto", "on", "off"] = option(
        "auto", "the training forwards as one batch, batch norm by forward; auto does so on a GPU with channels_last"
    )
    capture: Literal["auto", "on", "off"] = option(
        "auto", "record the step in a CUDA graph; auto does so on a GPU with fused_sgd"
    )
    teacher_ahead: int = option(
        8, "ask the teacher for so many batches at once, between steps; 0: within each step", at_most=1000
    )
    teacher_table: Literal["auto", "on", "off"] = option(
        "auto", "keep the teacher's answers to every view of an image on disk; auto does so up to 4 GiB"
    )
    fused_sgd: bool = option(True, "run the optimiser as one kernel")
    beside: bool = option(
        False, "on a GPU, ask the teacher, or the average, within the step on a stream beside the attack's"
    )
    kept: Literal["device", "disk"] = option(
        "device", "where the attack pgi keeps its perturbations: on the device, or in a file that is mapped into memory"
    )
    extra_on: Literal["auto", "device", "disk"] = option(
        "auto",
        "where the images of --extra lie: on the device, or in their files, read ahead by a thread; auto puts them on "
        "a GPU where they take up to half of its free memory",
    )
    loader: Literal["auto", "ffcv", "resident"] = option(
        "auto", "where the images lie: an FFCV file, or all in memory; both give the same batches"
    )
    cpu_threads: int | None = option(
        None, "threads on a CPU (none: as many as torch takes)", positive=True, at_most=512
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_table == "on" and not self.teacher_ahead:
            raise ValueError("teacher_table = 'on': a teacher asked within the step fills no table; set teacher_ahead")

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """Return the dtype that networks compute in on `device`."""
        if self.precision != "auto":
            return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32

    def epilogue_on(self, device: torch.device) -> str:
        """Return "plain", "fused", "convolution" or "compiled", as it is on `device`."""
        if self.epilogue != "auto":
            return self.epilogue
        return "convolution" if device.type == "cuda" else "plain"

    def together_on(self, device: torch.device) -> bool:
        """Say whether the training forwards of a step run as one batch."""
        pays = device.type == "cuda" and self.channels_last  # the kernels of batch norm read that layout alone
        return self.together == "on" or (self.together == "auto" and pays)

    def captures_on(self, device: torch.device) -> bool:
        """Say whether steps are recorded in a CUDA graph and replayed.

        Raises:
            ValueError: capture is asked for where it is not possible.
        """
        possible = device.type == "cuda" and self.fused_sgd  # of the optimizers, the fused one reads its rate there
        if self.capture == "on" and not possible:
            raise ValueError("capture = 'on': CUDA graphs need a GPU, and fused_sgd; leave it at 'auto'")
        return self.capture != "off" and possible
