"""The libraries that a user would take instead, each imported as it needs to be; none of them is required.

pip install 'retemper[bench]'
"""

import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

INSTALL = "pip install 'retemper[bench]'"
VISION_OPERATORS = {  # that torchvision's library declares -> their arguments
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def missing(*packages: str) -> str | None:
    """Return the reason why a row that needs these packages cannot be measured here, or None."""
    absent = [package for package in packages if find_spec(package) is None]
    return f"needs {', '.join(absent)}: {INSTALL}" if absent else None


def library(name: str) -> Any:
    """Return the module of that name, untyped, imported without its warnings. Raises ImportError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module(name)


def torchvision_transforms() -> Any:
    """Return the module torchvision.transforms. Raises ImportError.

    The wheel is built for CUDA: beside a torch without CUDA its own library is not loaded, and its import fails for
    want of two operators. With those declared here, all that is plain Python works, the transforms among it.
    """
    for name, arguments in VISION_OPERATORS.items():
        if torch.version.cuda is None and not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", arguments)
    return library("torchvision.transforms")
