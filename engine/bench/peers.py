"""The libraries that a user would take instead, each imported in the way it needs; none of them is required.

pip install 'retemper[bench]'
"""

import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

INSTALL = "pip install 'retemper[bench]'"


def missing(*packages: str) -> str | None:
    """Why a row that needs them cannot run here, or None."""
    absent = [package for package in packages if find_spec(package) is None]
    return f"needs {', '.join(absent)}: {INSTALL}" if absent else None


def torchattacks() -> Any:
    """The library, untyped. Raises ImportError."""
    return _import("torchattacks")


def foolbox() -> Any:
    """Likewise."""
    return _import("foolbox")


def eagerpy() -> Any:
    """What foolbox wraps tensors in."""
    return _import("eagerpy")


def liger_kl() -> Any:
    """Liger's KL divergence, an autograd function: (log-probabilities, probabilities, reduction) to the loss."""
    return _import("liger_kernel.ops.kl_div").LigerKLDivLossFunction


def torchvision_transforms() -> Any:
    """torchvision.transforms.

    The wheel is built for CUDA; beside a torch without it, its import stops at two operators that its library would
    have declared. Declared here, they let everything that is plain Python work, transforms among it.
    """
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        if torch.version.cuda is None and not _declared(f"torchvision::{schema.partition('(')[0]}"):
            torch.library.define(f"torchvision::{schema.partition('(')[0]}", schema[schema.index("(") :])
    return _import("torchvision.transforms")


def _declared(operator: str) -> bool:
    namespace, _, name = operator.partition("::")
    return hasattr(getattr(torch.ops, namespace), name)


def _import(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on what else they import
        return import_module(name)
