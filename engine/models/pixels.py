"""The mean and the deviation of each data set's pixels, and the networks that normalise by them."""

from torch import nn

from retemper.engine.models.normalised import Normalised

# of the training pixels in [0, 1], by data set. CIFAR's as CFA and FAAL write them, Tiny-ImageNet's as IAD does,
# SVHN's as Rice does, who only scales them, Fashion-MNIST's as usual; of the digits ours, measured on the 1,198
# training images
PIXELS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "tiny-imagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "svhn": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "fashion-mnist": ((0.2860,), (0.3530,)),
    "digits": ((0.3053,), (0.3758,)),
}

# of the published networks that normalise their images themselves; on images of other sets they take CIFAR-10's
OWN_PIXELS = PIXELS | {"cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))}
GREY = (0.5,), (0.5,)


def own_pixels(dataset: str | None, num_classes: int, channels: int) -> dict[str, tuple[float, ...]]:
    """Return the "mean" and the "std" for a network that normalises its images itself.

    Args:
        dataset: of its images; None means CIFAR-100 where it has 100 classes, and CIFAR-10 otherwise.
        num_classes, channels: of its images.
    """
    if dataset is None:
        dataset = "cifar100" if num_classes == 100 else "cifar10"
    found = OWN_PIXELS.get(dataset, OWN_PIXELS["cifar10"])
    mean, std = found if len(found[0]) == channels else GREY
    return {"mean": mean, "std": std}


def normalising(network: nn.Module, dataset: str) -> Normalised:
    """Return the network with the layer before it that normalises the images of a data set.

    Raises:
        ValueError: the data set is no key of `PIXELS`.
    """
    if dataset not in PIXELS:
        raise ValueError(f"no mean and deviation are known of the pixels of {dataset!r}, but of {', '.join(PIXELS)}")
    return Normalised(network, *PIXELS[dataset])
