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
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from traceback import extract_tb
from types import ModuleType

import torch
from torch import Tensor, nn

from retemper.engine.checkpoints.content import few
from retemper.engine.checkpoints.surroundings import (
    failing_as,
    first_line,
    importable,
    telling_partial_loads,
    weights_only,
)
from retemper.engine.checkpoints.weights import state_digest
from retemper.engine.device import is_out_of_memory
from retemper.engine.models import NORMALISING, channels_last, create_model, is_timm
from retemper.errors import DataError, UsageError, nearest
from retemper.options import FUNCTION as USER
from retemper.packages import import_package

# robustbench imports auto-attack without naming it among its requirements
# and pkg_resources, which later versions of setuptools do not bring
INSTALL = "pip install robustbench 'setuptools<81' 'git+https://github.com/fra31/auto-attack'"
ROBUSTBENCH = re.compile(r"robustbench:(?P<model>[^@/]+)(@(?P<dataset>[^@/]+)(/(?P<threat>[^@/]+))?)?")


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
            utils = import_package("robustbench.utils")
        except ImportError as error:
            raise UsageError(f"{self.name} needs the package robustbench ({error}): {INSTALL}") from None
        except Exception as error:  # a broken installation may raise anything
            why = first_line(error)
            raise UsageError(f"{self.name}: the package robustbench cannot be imported ({why}): {INSTALL}") from None
        folder = cache / "robustbench"

        def advice(error: BaseException) -> str:
            file = folder / str(self.dataset) / self.threat / f"{self.model}.pt"
            if isinstance(error, KeyError | ValueError):
                return "; the names of its networks are at https://robustbench.github.io"
            if file.exists():
                return f"; if its download broke off, delete {file}"
            return f"; it is downloaded once: go online, or put its file at {file}" * isinstance(error, OSError)

        failing = failing_as(f"RobustBench does not load {self.name}", advice)
        with failing, weights_only(), redirect_stdout(sys.stderr):  # stdout is for the command's own result
            return utils.load_model(
                model_name=self.model, dataset=self.dataset, threat_model=self.threat, model_dir=str(folder)
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
        with importable(self.file.parent):
            module = self._module()
            if not callable(factory := getattr(module, self.factory, None)):
                known = [name for name, value in vars(module).items() if callable(value)]
                raise UsageError(f"{self.file} has no function {self.factory!r}{nearest(self.factory, known)}")
            with failing_as(f"{self.name} builds no network", self._advice), telling_partial_loads(self.name):
                return factory(**_wanted(factory, num_classes, channels))

    def call(self, num_classes: int, channels: int) -> str:
        """Return the call that builds the network, as one writes it in Python. Raises as `build`."""
        with importable(self.file.parent):
            given = _wanted(getattr(self._module(), self.factory), num_classes, channels)
        return f"{self.factory}({', '.join(f'{name}={value}' for name, value in given.items())})"

    def _advice(self, error: BaseException) -> str:
        """Return what to do about an error in the user's code, with the line that it comes from."""
        if isinstance(error, SystemExit):
            return "; it leaves Python: put what it does as a script under if __name__ == '__main__'"
        path = os.path.abspath(self.file)
        lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == path]
        if not lines and isinstance(error, TypeError) and "required" in str(error):
            return "; it is given num_classes and channels alone: let all else have a default"
        return f"; line {lines[-1]} of {self.file.name}" if lines else ""

    def _module(self) -> ModuleType:
        name = f"user_network_{self.file.stem}"
        if self.file.is_dir():
            raise DataError(f"{self.file} is a folder: name the file that holds your network")
        spec = importlib.util.spec_from_file_location(name, self.file)
        if spec is None or spec.loader is None or not self.file.is_file():
            raise DataError(f"{self.file} does not exist: name the file that holds your network")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        with failing_as(f"{self.file} cannot be imported", self._advice):
            spec.loader.exec_module(module)
        return module

    def digest(self, state: str) -> str:
        """Return the digest of this network, of state and file: the same weights under other code are another one."""
        return sha256(state.encode() + self.file.read_bytes()).hexdigest()


def _wanted(factory: Callable[..., object], num_classes: int, channels: int) -> dict[str, int]:
    """Return which of the two a user's factory takes, by name."""
    given, known = dict(num_classes=num_classes, channels=channels), inspect.signature(factory).parameters
    return {name: value for name, value in given.items() if name in known}


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
    if is_timm(name):
        raise UsageError(
            f"{name} has no trained weights: name the file that has them, with --model {name} (of a teacher, "
            f"--teacher-model {name})"
        )
    if name.startswith("robustbench:"):
        raise UsageError(f"{name}: write it as robustbench:NAME or robustbench:NAME@cifar10/Linf")
    if re.search(r"\.py(:|$)", name) and not Path(name).is_dir():
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
    built = build_module(network, num_classes, shape[2], cache)
    with failing_as(f"{network.name} is not ready for use"):  # lazy or without data; scripted ones lack some methods
        digest = network.digest(state_digest(built))
        built = built.float().eval()
        for weight in built.parameters():
            weight.requires_grad_(False)
        tensors = {name: value for name, value in built.state_dict().items() if isinstance(value, Tensor)}
        strange = [name for name, value in tensors.items() if not value.isfinite().all()]
    if strange:
        raise DataError(f"{network.name} has weights that are not finite: {few(strange)}")
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
            problem = first_line(error)
            continue
        if not isinstance(answer, Tensor) or answer.shape != (2, num_classes):
            got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise DataError(
                f"{network.name} answers two images of {num_classes} classes with {got}, not {(2, num_classes)}"
            )
        return model.eval(), digest
    raise DataError(f"{network.name} does not take images of {C} x {H} x {W} ({problem})")


def build_module(network: ExternalNetwork, num_classes: int, channels: int, cache: Path) -> nn.Module:
    """Build a network, and take it out of DataParallel and torch.compile, which do not follow it to another device.

    Args:
        cache: the folder for downloads.
    Raises:
        UsageError, DataError: it cannot be built, or is no nn.Module.
    """
    built = network.build(num_classes, channels, cache)
    if not isinstance(built, nn.Module):
        raise UsageError(f"{network.name} is a {type(built).__name__}: it must be an nn.Module")
    while isinstance(built, nn.DataParallel) or "_orig_mod" in built._modules:
        built = built.get_submodule("module" if isinstance(built, nn.DataParallel) else "_orig_mod")
    return built


def build_student(
    model: str, num_classes: int, *, channels: int | None, dataset: str | None = None, side: int | None = None
) -> nn.Module:
    """Build a network with fresh weights: one that `create_model` knows, or of the user's net.py:build.

    Args:
        dataset: of its images; a network of `NORMALISING` normalises them as it was published for that.
        side: pixels of its images.
    Raises:
        ValueError: no network has this name.
        UsageError, DataError: the user's code does not build one.
    """
    if (own := users_network(model)) is None:
        normalise = dataset if model in NORMALISING else None
        return create_model(model, num_classes, channels=channels, normalise=normalise, image_size=side)
    return build_module(own, num_classes, 3 if channels is None else channels, Path()).float().requires_grad_().train()


def users_network(model: str) -> UserNetwork | None:
    """Return the user's network where `model` means one, as net.py:build; None for a name of the literature."""
    found = USER.fullmatch(model)
    return UserNetwork(file=Path(found["file"]), factory=found["factory"]) if found else None


def source_digest(model: str) -> str | None:
    """Return the SHA-256 of the file that builds a user's network, or None for a network of the literature.

    Raises:
        DataError: the file is gone.
    """
    if (own := users_network(model)) is None:
        return None
    if not own.file.is_file():
        raise DataError(f"{own.file} does not exist: the network is built by it, put it back")
    return sha256(own.file.read_bytes()).hexdigest()


def require_same_source(model: str, digest: str | None) -> None:
    """Raise DataError where the file that builds a user's network is not the one that it was trained with."""
    if digest is not None and source_digest(model) != digest:
        raise DataError(f"{model.rpartition(':')[0]} has changed since the network was trained: put the old file back")


def require_usable(model: str, built: nn.Module, num_classes: int, shape: Shape, layout: torch.memory_format) -> None:
    """Try a user's network on two grey images of `shape` (H, W, C), laid out as in training.

    Raises:
        DataError: it does not map them to (2, K) logits.
    """
    H, W, C = shape
    image = torch.full((2, C, H, W), 0.5).clone(memory_format=layout)
    advice = "; try --channels-last false" if layout is torch.channels_last else ""
    with failing_as(f"{model} does not take images of {C} x {H} x {W}", lambda _: advice), torch.no_grad():
        answer = built.to(memory_format=layout).eval()(image)  # pyright: ignore[reportCallIssue]
    built.train()
    if not isinstance(answer, Tensor) or answer.shape != (2, num_classes):
        got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise DataError(f"{model} answers two images of {num_classes} classes with {got}, not {(2, num_classes)}")


class Contiguous(nn.Module):
    """A network whose code does not take channels-last images: it is given contiguous copies of them."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.module = network.to(device, memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, C, H, W) pixels to (B, K) logits."""
        return self.module(image.clone(memory_format=torch.contiguous_format))
