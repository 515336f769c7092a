"""Networks whose code is not this library's: RobustBench's by name, and the user's own by file.

    robustbench:NAME[@DATASET[/THREAT]]   as the package `robustbench` loads it; Linf where no threat is named
    path/to/net.py:factory                the nn.Module that `factory` of the user's file returns, its weights in it

The user's file is trusted and runs as it stands; so does the code of the package `robustbench`. The checkpoints that
the package downloads are not trusted: while it loads one, `torch.load` reads weights only, whatever the package asks
for. Dimension key: B batch, C channels, H, W, K classes.
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

from retemper.engine.checkpoints.weights import plain_name
from retemper.engine.device import is_out_of_memory
from retemper.engine.models import channels_last
from retemper.errors import DataError, UsageError, nearest

# robustbench imports auto-attack without naming it among its requirements
INSTALL = "pip install robustbench 'git+https://github.com/fra31/auto-attack'"
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
        """Return the name in full, with data set and threat."""
        return f"robustbench:{self.model}@{self.dataset}/{self.threat}"

    def build(self, num_classes: int, channels: int, cache: Path) -> object:
        """Return the object that the package loads; it puts its downloads into `cache`.

        Raises:
            UsageError: the package is not installed.
            DataError: the package does not load this network.
        """
        try:
            utils = importlib.import_module("robustbench.utils")
        except ImportError as error:
            raise UsageError(f"{self.name} needs the package robustbench ({error}): {INSTALL}") from None
        folder = str(cache / "robustbench")
        with _failing_as(f"RobustBench does not load {self.name}"), _weights_only():
            return utils.load_model(
                model_name=self.model, dataset=self.dataset, threat_model=self.threat, model_dir=folder
            )

    def digest(self, state: str) -> str:
        """Return the digest of this network: that of its state."""
        return state


@dataclass(frozen=True, kw_only=True)
class UserNetwork:
    """A network that a function or a class of the user's own file returns. Its data set is not known."""

    file: Path
    factory: str
    dataset: str | None = None

    @property
    def name(self) -> str:
        """Return the file and the factory, as the user wrote them."""
        return f"{self.file}:{self.factory}"

    def build(self, num_classes: int, channels: int, cache: Path) -> object:
        """Call the factory, with `num_classes` and `channels` if it has such parameters, and return its result.

        Raises:
            UsageError: the file has no such function.
            DataError: there is no such file, or its code raises an error.
        """
        with _importable(self.file.parent):
            module = self._module()
            if not callable(factory := getattr(module, self.factory, None)):
                known = [name for name, value in vars(module).items() if callable(value)]
                raise UsageError(f"{self.file} has no function {self.factory!r}{nearest(self.factory, known)}")
            with _failing_as(f"{self.name} builds no network"):
                given = dict(num_classes=num_classes, channels=channels)
                wanted = given.keys() & inspect.signature(factory).parameters.keys()
                return factory(**{name: given[name] for name in wanted})

    def _module(self) -> ModuleType:
        name = f"user_network_{self.file.stem}"
        spec = importlib.util.spec_from_file_location(name, self.file)
        if spec is None or spec.loader is None or not self.file.is_file():
            raise DataError(f"{self.file} does not exist: name the file that holds your network")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        with _failing_as(f"{self.file} cannot be imported"):
            spec.loader.exec_module(module)
        return module

    def digest(self, state: str) -> str:
        """Return the digest of this network, of state and file: the same weights under other code are another one."""
        return sha256(state.encode() + self.file.read_bytes()).hexdigest()


ExternalNetwork = RobustBenchNetwork | UserNetwork
Shape = tuple[int, int, int]  # (H, W, C) of images


def external_network(name: str, dataset: str | None) -> ExternalNetwork | None:
    """Return the network that `name` means, or None if it has neither form and must be a file or a folder.

    Args:
        dataset: RobustBench's data set where the name says none: that of the images at hand.
    Raises:
        UsageError: the name is almost of one of the forms.
    """
    if found := ROBUSTBENCH.fullmatch(name):
        return RobustBenchNetwork(
            model=found["model"], dataset=found["dataset"] or dataset, threat=found["threat"] or "Linf"
        )
    if found := USER.fullmatch(name):
        return UserNetwork(file=Path(found["file"]), factory=found["factory"])
    if name.startswith("robustbench:"):
        raise UsageError(f"{name}: write it as robustbench:NAME or robustbench:NAME@cifar10/Linf")
    if re.search(r"\.py(:|$)", name):
        raise UsageError(f"{name}: name the function too that returns the network, as in net.py:build")
    return None


def load_external(
    network: ExternalNetwork, num_classes: int, shape: Shape, device: torch.device, cache: Path
) -> tuple[nn.Module, str]:
    """Build a network, and try it on two grey images.

    Args:
        shape: (H, W, C) of the images.
        cache: the folder for downloads.
    Returns:
        The network, from (B, C, H, W) pixels to (B, K) logits: frozen, float32, in eval mode, channels-last if its
        code can do that; and its digest, 64 hexadecimal digits.
    Raises:
        UsageError, DataError: it cannot be built, or does not map such images to so many logits.
    """
    built = network.build(num_classes, shape[2], cache)
    if not isinstance(built, nn.Module):
        raise UsageError(f"{network.name} is a {type(built).__name__}: it must be an nn.Module")
    digest = network.digest(state_digest(built))
    built = built.float().eval()
    for parameter in built.parameters():  # a scripted module has no `requires_grad_` of its own
        parameter.requires_grad_(False)
    H, W, C = shape
    image = torch.full((2, C, H, W), 0.5, device=device).clone(memory_format=torch.channels_last)
    problem = ""
    for layout in (channels_last, Contiguous):
        try:
            model = layout(built, device)
            with torch.no_grad():
                answer = model(image)
        except Exception as error:  # the network's code may raise anything
            if is_out_of_memory(error):
                raise
            problem = _first_line(error)
            continue
        if not isinstance(answer, Tensor) or answer.shape != (2, num_classes):
            got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise DataError(
                f"{network.name} answers two images of {num_classes} classes with {got}, not {(2, num_classes)}"
            )
        return model.eval(), digest
    raise DataError(f"{network.name} does not take images of {C} x {H} x {W} ({problem})")


def state_digest(model: nn.Module) -> str:
    """Return the SHA-256 of all weights and statistics, 64 hexadecimal digits: names, dtypes, shapes and bytes."""
    state = {plain_name(name): value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    digest = sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Contiguous(nn.Module):
    """A network whose code does not take channels-last images: it is given contiguous copies of them."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.module = network.to(device, memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, C, H, W) pixels to (B, K) logits."""
        return self.module(image.clone(memory_format=torch.contiguous_format))


@contextmanager
def _failing_as(problem: str) -> Iterator[None]:
    """Turn whatever other people's code raises within the context into a DataError that begins with `problem`."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise DataError(f"{problem} ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    """Return the error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


@contextmanager
def _weights_only() -> Iterator[None]:
    """Make every `torch.load` within the context read tensors or fail; it never runs the code of a pickle."""
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
    """Let code within the context import the modules of `folder`, as Python does for a file that it runs."""
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))
