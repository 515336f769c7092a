"""Networks that are not this library's: RobustBench's by name, and the user's own by file.

    robustbench:NAME[@DATASET[/THREAT]]   as the package `robustbench` loads it; Linf where no threat is named
    path/to/net.py:factory                the nn.Module that `factory` of the user's file returns, its weights in it

What is trusted: the user's file, which is run as it stands, and the code of the package `robustbench`. The checkpoints
that the package downloads are not: while it loads one, `torch.load` reads weights only, whatever the package asks for.
Dimension key: B batch, C channels, H, W, K classes.
"""

import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from retemper.engine.catalogue import nearest
from retemper.engine.checkpoints.weights import state_digest
from retemper.engine.models import channels_last
from retemper.errors import DataError, UsageError

INSTALL = (
    "pip install robustbench 'git+https://github.com/fra31/auto-attack'"  # it imports the second, and does not ask
)
ROBUSTBENCH = re.compile(r"robustbench:(?P<model>[^@/]+)(@(?P<dataset>[^@/]+)(/(?P<threat>[^@/]+))?)?")
USER = re.compile(r"(?P<file>.+\.py):(?P<factory>\w+)")


@dataclass(frozen=True, kw_only=True)
class RobustBenchNetwork:
    """A network of RobustBench's model zoo."""

    model: str
    dataset: str | None
    threat: str

    @property
    def name(self) -> str:
        """Its name in full."""
        return f"robustbench:{self.model}@{self.dataset}/{self.threat}"

    def build(self, num_classes: int, channels: int, cache: Path) -> object:
        """What the package loads. Raises UsageError, DataError."""
        try:
            utils = importlib.import_module("robustbench.utils")
        except ImportError as error:
            raise UsageError(f"{self.name} needs the package robustbench ({error}): {INSTALL}") from None
        try:
            with _weights_only():
                return utils.load_model(
                    model_name=self.model,
                    dataset=self.dataset,
                    threat_model=self.threat,
                    model_dir=str(cache / "robustbench"),
                )
        except Exception as error:  # whatever the package, its downloads and torch.load raise
            raise DataError(f"RobustBench does not load {self.name} ({_told(error)})") from None

    def digest(self, state: str) -> str:
        """What tells this network from another, from the digest of its state."""
        return state


@dataclass(frozen=True, kw_only=True)
class UserNetwork:
    """What a function or a class of the user's own file returns."""

    file: Path
    factory: str
    dataset: str | None = None  # it does not say

    @property
    def name(self) -> str:
        """Likewise."""
        return f"{self.file}:{self.factory}"

    def build(self, num_classes: int, channels: int, cache: Path) -> object:
        """What the factory returns, given those of `num_classes` and `channels` that it names. Raises likewise."""
        with _importable(self.file.parent):
            module = self._module()
            if not callable(factory := getattr(module, self.factory, None)):
                known = [name for name, value in vars(module).items() if callable(value)]
                raise UsageError(f"{self.file} has no function {self.factory!r}{nearest(self.factory, known)}")
            try:
                given = dict(num_classes=num_classes, channels=channels)
                wanted = {name: given[name] for name in given.keys() & inspect.signature(factory).parameters.keys()}
                return factory(**wanted)
            except Exception as error:  # whatever the user's own code raises
                raise DataError(f"{self.file}:{self.factory} builds no network ({_told(error)})") from None

    def _module(self) -> ModuleType:
        name = f"user_network_{self.file.stem}"
        spec = importlib.util.spec_from_file_location(name, self.file)
        if spec is None or spec.loader is None or not self.file.is_file():
            raise DataError(f"{self.file} does not exist: name the file that holds your network")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # likewise
            raise DataError(f"{self.file} cannot be imported ({_told(error)})") from None
        return module

    def digest(self, state: str) -> str:
        """Likewise; the file counts too, since the same weights in other code are another network."""
        return sha256(state.encode() + self.file.read_bytes()).hexdigest()


Foreign = RobustBenchNetwork | UserNetwork
Shape = tuple[int, int, int]


def foreign(name: str, dataset: str | None) -> Foreign | None:
    """The network that `name` means, if it has one of the two forms above; None for a checkpoint or a folder.

    Args:
        dataset: of the images at hand: RobustBench's where the name says none.
    Raises:
        UsageError: it is nearly of one of the forms.
    """
    if found := ROBUSTBENCH.fullmatch(name):
        where = dict(dataset=found["dataset"] or dataset, threat=found["threat"] or "Linf")
        return RobustBenchNetwork(model=found["model"], **where)
    if found := USER.fullmatch(name):
        return UserNetwork(file=Path(found["file"]), factory=found["factory"])
    if name.startswith("robustbench:"):
        raise UsageError(f"{name}: write it as robustbench:NAME or robustbench:NAME@cifar10/Linf")
    if re.search(r"\.py(:|$)", name):
        raise UsageError(f"{name}: name the function too that returns the network, as in net.py:build")
    return None


def load_foreign(
    network: Foreign, num_classes: int, shape: Shape, device: torch.device, cache: Path
) -> tuple[nn.Module, str]:
    """The network, frozen, in eval mode, channels-last where it can; and its digest.

    Args:
        shape: (H, W, C) of the images.
        cache: where downloads go.
    Raises:
        UsageError, DataError: it cannot be built, or does not map such images to so many logits.
    """
    built = network.build(num_classes, shape[2], cache)
    if not isinstance(built, nn.Module):
        raise UsageError(f"{network.name} is a {type(built).__name__}: it must be an nn.Module")
    digest = network.digest(state_digest(built))
    built = built.float().eval().requires_grad_(False)
    H, W, C = shape
    image = torch.full((2, C, H, W), 0.5, device=device).clone(memory_format=torch.channels_last)
    problem = ""
    for layout in (channels_last, Contiguous):
        try:
            model = layout(built, device)
            with torch.no_grad():
                answer = model(image)
        except Exception as error:  # whatever its code raises
            problem = _told(error)
            continue
        if not isinstance(answer, Tensor) or answer.shape != (2, num_classes):
            got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise DataError(
                f"{network.name} answers two images of {num_classes} classes with {got}, not {(2, num_classes)}"
            )
        return model.eval(), digest
    raise DataError(f"{network.name} does not take images of {C} x {H} x {W} ({problem})")


class Contiguous(nn.Module):
    """A network that takes images laid out channel by channel only."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.module = network.to(device, memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) to (B, K)."""
        return self.module(image.clone(memory_format=torch.contiguous_format))


@contextmanager
def _weights_only() -> Iterator[None]:
    """Whoever calls `torch.load` inside gets tensors or an error, never the code of a pickle."""
    force, refuse = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (force, refuse)}
    os.environ[force] = "1"
    try:
        yield
    finally:
        del os.environ[force]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Modules beside the user's file can be imported inside, as if it were run."""
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))


def _told(error: Exception) -> str:
    """An exception of somebody else's code in half a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
