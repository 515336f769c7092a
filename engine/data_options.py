"""The options of the images that a run trains on: the first group of a recipe."""

from dataclasses import dataclass
from typing import Literal

from retemper.loaders import DATASETS
from retemper.options import Options, option


@dataclass(frozen=True, kw_only=True)
class Data(Options):
    """The images, and how they are varied."""

    dataset: str = option(help="the data set", choices=DATASETS)
    image_size: int | None = option(
        None, "resize images to this many pixels a side (none: as they are)", positive=True, at_most=4096
    )
    images_per_class: int | None = option(
        None, "train on so many images of each class (none: on all)", positive=True, at_most=10**7
    )
    imbalance: float | None = option(
        None,
        "train on a long tail, so many times more images of the first class than of the last: 100, not 0.01",
        positive=True,
        at_most=10**6,
    )
    extra_fraction: float = option(
        0.0, "with --extra: the share of each batch that is drawn from its images, as 0.7; the rest are real", at_most=1
    )
    max_side: int | None = option(
        None,
        "with augment resized-crop, of folders: store images at so many pixels a side, and cut views of image_size "
        "from them (none: store them at image_size)",
        positive=True,
        at_most=4096,
    )
    augment: Literal["crop", "cropshift", "idbh-weak", "idbh-strong", "idbh-svhn", "resized-crop"] = option(
        "crop",
        "what is done to images: a random crop; CropShift, which cuts off up to 10 of 32 lines and moves the rest; "
        "IDBH, which also changes colour or shape, and erases a part of half of the images (weak) or of all (strong); "
        "or a random box, resized, as on ImageNet",
    )
    crop_area: float = option(
        0.08, "with augment resized-crop: the least share of an image that is seen", positive=True, at_most=1
    )
    cutout: int = option(0, "put a black square of so many pixels a side into each image; 0: none", at_most=4096)
    padding: int = option(4, "pad by so many pixels and crop at random, with augment crop; 0: no cropping", at_most=128)
    padding_mode: Literal["zeros", "reflect"] = option(
        "zeros", "what lies outside an image that is cropped at random: black, or its mirror image"
    )
    flip: bool = option(True, "mirror half of the images")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.imbalance is not None and self.imbalance < 1:
            raise ValueError(
                f"imbalance = {self.imbalance:g}: it is the largest class over the smallest, so give its inverse, "
                f"{1 / self.imbalance:g}"
            )
        size, side = self.image_size, self.max_side
        if self.cutout and self.augment == "resized-crop":
            raise ValueError(f"cutout = {self.cutout}: augment = 'resized-crop' puts no squares: set cutout = 0")
        if side is not None and self.augment != "resized-crop":
            raise ValueError(f"max_side = {side}: augment = {self.augment!r} shows whole images: set max_side = none")
        if side is not None and (size is None or size > side):
            raise ValueError(
                f"max_side = {side}: views of image_size = {size} are cut from it: set both, it is the larger"
            )
        if self.extra_fraction == 1:
            raise ValueError("extra_fraction = 1: it must be below 1, since an epoch is counted on the real images")
        if self.extra_fraction and self.augment == "resized-crop":
            raise ValueError(
                "extra_fraction: a pool holds images of one size, augment = 'resized-crop' takes larger ones"
            )

    @property
    def strong(self) -> bool:
        """Say whether views are more than a crop and a flip: no table holds all views of an image then."""
        return self.augment != "crop" or self.cutout > 0
