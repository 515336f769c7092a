"""Other people's packages, imported where torchvision's own library cannot be loaded.

torchvision's wheel is built for CUDA. Beside a torch without CUDA its library is not loaded, and its import fails for
want of two operators, and with it that of every package that imports it. With those declared, all of it that is plain
Python works.
"""

import warnings
from importlib import import_module
from types import ModuleType

VISION_OPERATORS = {  # that torchvision's library declares -> their arguments
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def import_package(name: str) -> ModuleType:
    """Return the module of that name, imported without its warnings, whether it imports torchvision or not.

    Raises:
        ImportError: it is not installed, or lacks a package. What its code raises otherwise comes through.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _imported(name)


def _imported(name: str) -> ModuleType:
    try:
        return import_module(name)
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    import torch

    for (
        operator,
        arguments,
    ) in VISION_OPERATORS.items():  # only now: where torchvision's library works, it declares them
        if not hasattr(torch.ops.torchvision, operator):
            torch.library.define(f"torchvision::{operator}", arguments)
    return import_module(name)
