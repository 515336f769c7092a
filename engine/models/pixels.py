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


def normalising(network: nn.Module, dataset: str) -> Normalised:
    """Return the network with the layer before it that normalises the images of a data set.

    Raises:
        ValueError: the data set is no key of `PIXELS`.
    """
    if dataset not in PIXELS:
        raise ValueError(f"no mean and deviation are known of the pixels of {dataset!r}, but of {', '.join(PIXELS)}")
    return Normalised(network, *PIXELS[dataset])
