"""The content of a run's files, as far as it is read back: config.json, metrics.jsonl and the state."""

from typing import Any, TypedDict

from retemper.engine.groups import Data, Networks, TrainingAttack
from retemper.options import options_of
from retemper.shape import PathText


class Named(TypedDict):
    """How config.json names a network that the run builds on."""

    path: PathText
    model: str
    sha256: str


class NamedPool(TypedDict):
    """How config.json names a pool of extra images (`retemper.loaders.Pool.describe`)."""

    path: PathText
    images: int
    unlabelled: int
    fingerprint: str


class _Told(TypedDict):
    method: str
    setting: str
    recipe: dict[str, Any]
    seed: int
    classes: list[str]
    teacher: Named | None


class Config(_Told, total=False):
    """The content of config.json (`retemper.engine.run.job.Job.config`); files of earlier versions hold less."""

    channels: int
    out: str | None
    data_root: PathText | None
    clean_teacher: Named | None
    start: Named | None
    evened: dict[str, Any]
    extra: NamedPool
    loader: str
    jpeg_quality: int
    versions: dict[str, str | None]
    device: str
    processes: int
    commit: str | None
    started: str


class _Epoch(TypedDict):
    epoch: int


class EpochLine(_Epoch, total=False):
    """A line of metrics.jsonl (`retemper.engine.run.metrics.epoch_line`); the class state has names of its own."""

    loss: float | None
    lr: float | None
    images_per_second: float | None
    seconds: float | None
    peak_memory_mib: float | None
    class_loss: list[float | None]
    class_accuracy: list[float | None]
    holdout: dict[str, Any]
    guard: dict[str, Any]


class Scored(TypedDict):
    """How the state names the best epoch (`retemper.engine.run.selection.Best`)."""

    score: float
    epoch: int


class Saved(TypedDict):
    """What resuming needs of a state before it looks at the tensors (`retemper.engine.run.saving.Saver`)."""

    epoch: int
    step: int
    student: Any
    optimizer: Any
    scaler: Any
    class_state: Any
    generators: Any
    best: Scored


RECORDED = {  # of the recipe in config.json: what others read there, and the option that says what it may be
    name: options_of(group)[name]
    for group, names in ((Networks, ["student"]), (Data, ["dataset", "image_size"]), (TrainingAttack, ["eps"]))
    for name in names
}
