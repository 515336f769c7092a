"""The fifteen corruptions of CIFAR-10-C at five severities, computed on the fly (Hendrycks & Dietterich, ICLR 2019).

The constants are those that CIFAR-10-C was made with (hendrycks/robustness, make_cifar_c.py), which are for images of
32 x 32; lengths in pixels are scaled with the image's shorter side. No two things are theirs to the bit:

    frost           lies on the image as noise with the mean colours, contrast and spectrum of their five photographs
    motion, snow    are blurred along the nearest pixels of a line, as ImageMagick does it, with its edges repeated

Every image draws from a generator of its own, so that it is corrupted the same in any batch and on any machine.

Dimension key: B images, H W C pixels and channels, N the side of a fractal, T taps of a blur.
"""

import io
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any
from zlib import crc32

import numpy as np
from PIL import Image

CONSTANTS = "CIFAR-10-C, 1"  # as evaluation.json names them; a change of what is computed counts it up
SEVERITIES = (1, 2, 3, 4, 5)
SIDE = 32  # pixels of the images that the constants are for
ICE = ((0.30, 0.58, 0.65), (0.79, 0.81, 0.84), (0.79, 0.81, 0.84), (0.54, 0.60, 0.65), (0.44, 0.48, 0.53))  # RGB
GREY = np.array([0.299, 0.587, 0.114])  # of RGB


class Draws:
    """The random numbers of a batch: each image has its own generator, made when it is first asked."""

    def __init__(self, seed: int, name: str, severity: int, index_B: np.ndarray) -> None:
        self.key, self.index_B = (seed, crc32(name.encode()), severity), index_B

    @cached_property
    def generators(self) -> list[np.random.Generator]:
        """Return the generator of each image."""
        return [np.random.default_rng((*self.key, index)) for index in self.index_B.tolist()]

    def __call__(self, draw: Callable[[np.random.Generator], Any]) -> np.ndarray:
        """Return what `draw` takes from each generator, stacked: (B, ...)."""
        return np.stack([draw(generator) for generator in self.generators])


# Takes (B, H, W, C) float64 pixels in [0, 1], the constants of a severity, the scale of lengths and the draws.
Corruption = Callable[[np.ndarray, Any, float, Draws], np.ndarray]


def corrupt(image_BHWC: np.ndarray, name: str, severity: int, index_B: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return corrupted images, (B, H, W, C) uint8.

    Args:
        image_BHWC: uint8; one channel or three.
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        index_B: (B,) whole numbers that tell the images apart; an image's draws depend on its own alone.
        seed: not negative.
    Raises:
        ValueError: `image_BHWC` has another shape or type, or there is no such corruption.
    """
    if image_BHWC.ndim != 4 or image_BHWC.dtype != np.uint8 or image_BHWC.shape[-1] not in (1, 3):
        raise ValueError(f"image_BHWC: needs (B, H, W, 1 or 3) uint8, got {image_BHWC.shape} {image_BHWC.dtype}")
    if name not in CORRUPTIONS or severity not in SEVERITIES:
        raise ValueError(f"{name} at severity {severity}: it must be one of {', '.join(CORRUPTIONS)} at 1 to 5")
    change, constants = CORRUPTIONS[name]
    scale = min(image_BHWC.shape[1:3]) / SIDE
    draws = Draws(seed, name, severity, index_B)
    changed = change(image_BHWC / 255, constants[severity - 1], scale, draws)
    return _as_bytes(changed)


def _as_bytes(x: np.ndarray) -> np.ndarray:
    """Return pixels in [0, 1] as uint8, cut off as CIFAR-10-C's are; a whole number survives its rounding error."""
    return (x.clip(0, 1) * 255 + 1e-6).astype(np.uint8, order="C")


def gaussian_noise(x: np.ndarray, c: float, _: float, draws: Draws) -> np.ndarray:
    return x + c * draws(lambda rng: rng.standard_normal(x.shape[1:]))


def shot_noise(x: np.ndarray, c: float, _: float, draws: Draws) -> np.ndarray:
    of_image = iter(x)
    return draws(lambda rng: rng.poisson(next(of_image) * c)) / c


def impulse_noise(x: np.ndarray, c: float, _: float, draws: Draws) -> np.ndarray:
    """Set a share `c` of the values to 0 or 1, channel by channel."""
    drawn = draws(lambda rng: rng.random(x.shape[1:]))
    return np.where(drawn < c / 2, 0.0, np.where(drawn < c, 1.0, x))


def defocus_blur(x: np.ndarray, c: tuple[float, float], scale: float, _: Draws) -> np.ndarray:
    """Average over a disk of radius c[0], whose edge is softened by a Gaussian of 3 x 3 pixels."""
    from scipy.ndimage import convolve

    reach = max(2, math.ceil(c[0] * scale) + 1)
    line = np.arange(-reach, reach + 1)
    disk = (line**2 + line[:, None] ** 2 <= (c[0] * scale) ** 2).astype(float)
    soft = np.exp(-0.5 * (np.arange(-1, 2) / (c[1] * scale)) ** 2)
    kernel = convolve(disk / disk.sum(), np.outer(soft, soft) / soft.sum() ** 2, mode="constant")
    return convolve(x, kernel[None, :, :, None], mode="mirror")


def _gaussian(x: np.ndarray, sigma: float) -> np.ndarray:
    """Blur (B, H, W, ...) within each image and channel."""
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(x, (0, sigma, sigma, *[0] * (x.ndim - 3)), mode="nearest")


def glass_blur(x: np.ndarray, c: tuple[float, int, int], scale: float, draws: Draws) -> np.ndarray:
    """Replace each pixel by a neighbour, c[2] times over, between two blurs by a Gaussian of c[0] pixels.

    The authors mean to swap the two, and their code copies the neighbour: CIFAR-10-C holds copies.
    """
    sigma, reach, times = c[0] * scale, max(1, round(c[1] * scale)), c[2]
    x = _as_bytes(_gaussian(x, sigma))
    height, width = x.shape[1:3]
    images = np.arange(len(x))
    for _ in range(times):
        step_BHW2 = draws(lambda rng: rng.integers(-reach, reach, (height, width, 2)))
        for h in range(height - reach, reach, -1):
            for w in range(width - reach, reach, -1):
                x[:, h, w] = x[images, h + step_BHW2[:, h, w, 0], w + step_BHW2[:, h, w, 1]]
    return _gaussian(x / 255, sigma)


def _along(x: np.ndarray, radius: float, sigma: float, angle_B: np.ndarray) -> np.ndarray:
    """Blur (B, H, W, ...) to one side along a line, by half a Gaussian of 2 `radius` + 1 taps; angles in degrees."""
    weight_T = np.exp(-0.5 * (np.arange(2 * math.ceil(radius) + 1) / sigma) ** 2)
    weight_T = weight_T[weight_T > 1e-5] / weight_T.sum()
    images, across = np.arange(len(x))[:, None, None], np.deg2rad(angle_B)
    height, width = x.shape[1:3]
    blurred = np.zeros_like(x)
    for tap, weight in enumerate(weight_T):
        down_B, right_B = (np.ceil(tap * part - 0.5).astype(int) for part in (np.sin(across), np.cos(across)))
        rows = (np.arange(height)[None, :, None] + down_B[:, None, None]).clip(0, height - 1)
        columns = (np.arange(width)[None, None, :] + right_B[:, None, None]).clip(0, width - 1)
        blurred += weight * x[images, rows, columns]
    return blurred


def motion_blur(x: np.ndarray, c: tuple[float, float], scale: float, draws: Draws) -> np.ndarray:
    return _along(x, c[0] * scale, c[1] * scale, draws(lambda rng: rng.uniform(-45, 45)))


def _zoomed(x: np.ndarray, factor: float) -> np.ndarray:
    """Return the middle of (B, H, W, C) enlarged to the whole, by linear interpolation."""
    rows, columns = (_enlarging(side, factor) for side in x.shape[1:3])
    return np.einsum("hi,biwc->bhwc", rows, np.einsum("wj,bijc->biwc", columns, x, optimize=True), optimize=True)


def _enlarging(side: int, factor: float) -> np.ndarray:
    """Return the matrix, (side, side), that enlarges the middle of a line of pixels to its whole length."""
    part = math.ceil(side / factor)
    large = round(part * factor)
    place = (np.arange(side) + (large - side) // 2) * (part - 1) / max(1, large - 1) + (side - part) // 2
    return (1 - abs(place[:, None] - np.arange(side))).clip(0)


def zoom_blur(x: np.ndarray, c: float, _: float, __: Draws) -> np.ndarray:
    factors = np.arange(1, c, 0.01)
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def snow(x: np.ndarray, c: tuple[float, ...], scale: float, draws: Draws) -> np.ndarray:
    """Whiten the image, and lay flakes on it that fall within 45 degrees of straight down."""
    mean, spread, flake, least, radius, sigma, kept = c
    flakes = draws(lambda rng: rng.normal(mean, spread, x.shape[1:3]))[..., None]
    flakes = _zoomed(flakes, max(1.0, flake * scale))
    flakes = np.where(flakes < least, 0, flakes).clip(0, 1)
    flakes = _along(flakes, radius * scale, sigma * scale, draws(lambda rng: rng.uniform(-135, -45)))
    grey = (x @ GREY)[..., None] if x.shape[-1] == 3 else x
    x = kept * x + (1 - kept) * np.maximum(x, grey * 1.5 + 0.5)
    return x + flakes + flakes[:, ::-1, ::-1]


def frost(x: np.ndarray, c: tuple[float, float], _: float, draws: Draws) -> np.ndarray:
    """Lay ice on the image: noise whose amplitudes fall as frequency^-1.2, in the colour of one photograph of five."""
    height, width = x.shape[1:3]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = math.inf  # no mean
    colour_BC = np.array(ICE)[draws(lambda rng: rng.integers(len(ICE)))] + draws(lambda rng: rng.normal(0, 0.045, 1))
    colour_BC = colour_BC if x.shape[-1] == 3 else colour_BC @ GREY[:, None]
    white = draws(lambda rng: rng.standard_normal((height, width)))
    rough = np.fft.irfft2(np.fft.rfft2(white) * frequency**-1.2, (height, width))
    rough *= 0.06 / rough.std(axis=(1, 2), keepdims=True)
    return c[0] * x + c[1] * (colour_BC[:, None, None] + rough[..., None]).clip(0, 1)


def _fractal(draw_BNN: np.ndarray, decay: float) -> np.ndarray:
    """Return heights from 0 to 1 by diamonds and squares, periodic; at half the step the draws count decay^-2 times."""
    height_BNN, step, size = np.zeros_like(draw_BNN), draw_BNN.shape[1], 1.0
    while step >= 2:
        half, corner = step // 2, height_BNN[:, ::step, ::step]
        middle = corner + np.roll(corner, -1, axis=1)
        middle = (middle + np.roll(middle, -1, axis=2)) / 4 + size * draw_BNN[:, half::step, half::step]
        height_BNN[:, half::step, half::step] = middle
        beside = (corner + np.roll(corner, -1, axis=2) + middle + np.roll(middle, 1, axis=1)) / 4
        height_BNN[:, ::step, half::step] = beside + size * draw_BNN[:, ::step, half::step]
        below = (corner + np.roll(corner, -1, axis=1) + middle + np.roll(middle, 1, axis=2)) / 4
        height_BNN[:, half::step, ::step] = below + size * draw_BNN[:, half::step, ::step]
        step, size = half, size / decay**2
    height_BNN -= height_BNN.min(axis=(1, 2), keepdims=True)
    return height_BNN / height_BNN.max(axis=(1, 2), keepdims=True)


def fog(x: np.ndarray, c: tuple[float, float], _: float, draws: Draws) -> np.ndarray:
    side = 1 << (max(x.shape[1:3]) - 1).bit_length()
    mist = _fractal(draws(lambda rng: rng.uniform(-1, 1, (side, side))), c[1])[:, : x.shape[1], : x.shape[2], None]
    top = x.max(axis=(1, 2, 3), keepdims=True)
    return (x + c[0] * mist) * top / (top + c[0])


def brightness(x: np.ndarray, c: float, _: float, __: Draws) -> np.ndarray:
    """Raise V of HSV, which scales the channels of a pixel."""
    value = x.max(axis=-1, keepdims=True)
    raised = (value + c).clip(0, 1)
    return np.where(value > 0, x * raised / np.where(value > 0, value, 1), raised)


def contrast(x: np.ndarray, c: float, _: float, __: Draws) -> np.ndarray:
    mean = x.mean(axis=(1, 2), keepdims=True)
    return (x - mean) * c + mean


def elastic_transform(x: np.ndarray, c: tuple[float, float, float], scale: float, draws: Draws) -> np.ndarray:
    """Move three points of the image, and then every pixel by a smooth field; lengths are parts of the side."""
    from scipy.ndimage import gaussian_filter, map_coordinates

    height, width = x.shape[1:3]
    strength, sigma, moved = (part * scale * SIDE for part in c)
    middle, reach = np.array([width // 2, height // 2]), min(height, width) // 3
    corner_32 = middle + reach * np.array([(1, 1), (1, -1), (-1, -1)])
    to_B32 = corner_32 + draws(lambda rng: rng.uniform(-moved, moved, (3, 2)))
    affine_B32 = np.linalg.solve(np.concatenate([to_B32, np.ones((len(x), 3, 1))], axis=2), corner_32[None])
    row, column = np.mgrid[:height, :width]
    from_BHW2 = np.stack([column, row, np.ones_like(row)], axis=-1) @ affine_B32[:, None]
    step_BHW2 = draws(lambda rng: rng.uniform(-1, 1, (height, width, 2)))
    if sigma:
        step_BHW2 = gaussian_filter(step_BHW2, (0, sigma, sigma, 0), mode="reflect", truncate=3)
    moved_BHW2 = np.stack([column, row], axis=-1) + strength * step_BHW2
    for place_BHW2, edge in ((from_BHW2, "mirror"), (moved_BHW2, "reflect")):
        image, channel = np.arange(len(x))[:, None, None, None], np.arange(x.shape[-1])
        places = image, place_BHW2[..., 1, None], place_BHW2[..., 0, None], channel
        x = map_coordinates(x, np.broadcast_arrays(*places), order=1, mode=edge)
    return x


def _each(x: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Return the images, each changed by Pillow."""
    grey = x.shape[-1] == 1
    images = (Image.fromarray(one[..., 0] if grey else one) for one in _as_bytes(x))
    return np.stack([np.asarray(change(one)) for one in images]).reshape(x.shape) / 255


def pixelate(x: np.ndarray, c: float, _: float, __: Draws) -> np.ndarray:
    height, width = x.shape[1:3]
    coarse = int(width * c), int(height * c)
    return _each(
        x, lambda image: image.resize(coarse, Image.Resampling.BOX).resize((width, height), Image.Resampling.BOX)
    )


def jpeg_compression(x: np.ndarray, c: int, _: float, __: Draws) -> np.ndarray:
    def through(image: Image.Image) -> Image.Image:
        image.save(file := io.BytesIO(), "JPEG", quality=c)
        return Image.open(file)

    return _each(x, through)


CORRUPTIONS: dict[str, tuple[Corruption, tuple[Any, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": (glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
    "motion_blur": (motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": (
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": (frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": (fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (
        elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (jpeg_compression, (80, 65, 58, 50, 40)),
}  # by name, and the constants of each severity
