"""What the settings share on each data set: the images, the attack, the schedule and the teacher."""

from typing import Any

DIGITS: dict[str, Any] = dict(
    dataset="digits",
    eps=0.15,
    attack_step=0.15 / 4,
    padding=1,
    flip=False,
    loader="resident",  # 77 kB of pixels: FFCV takes longer to start than an epoch takes
    cpu_threads=1,  # two gain a third on an idle machine, lose tenfold on a busy one, and round differently
    batch_size=32,
    epochs=20,
    lr_drops=(14, 18),
    holdout_per_class=10,
    select_every=4,
    select_from=18,  # ten images a class can choose among the last epochs, not between early and late ones
    select_always_from=18,
)
FASHION: dict[str, Any] = dict(dataset="fashion-mnist", eps=0.1, attack_step=0.1 / 4, padding=2)
FASHION_SMALL: dict[str, Any] = FASHION | dict(
    image_size=14,
    images_per_class=2_000,
    padding=1,
    cpu_threads=1,  # as for the digits: the same bits on every machine, and a core left for another run
    epochs=10,
    lr_drops=(7, 9),
    holdout_per_class=50,
    select_every=2,
    select_always_from=8,
)
CIFAR10_SMALL: dict[str, Any] = dict(  # eps 8/255, steps of 2/255, crops and flips: the authors', as by default
    dataset="cifar10",
    cpu_threads=1,
    epochs=10,
    lr_drops=(7, 9),
    holdout_per_class=50,
    select_every=2,
    select_always_from=8,
)
# the settings of ten epochs on one core: methods have the same options in both
SMALL: tuple[str, ...] = ("fashion_mnist_small", "cifar10_small")
CIFAR10: dict[str, Any] = dict(dataset="cifar10", teacher_model="wrn34_10", teacher_recipe="trades:cifar10_wrn34_10")
CIFAR100: dict[str, Any] = dict(
    dataset="cifar100", teacher_model="wrn34_10", teacher_recipe="trades:cifar100_wrn34_10", holdout_per_class=10
)
# The rate, and images neither cropped nor mirrored: Rice's script for SVHN (whose step is 2/255); FRL's loader shows
# the images so too. The step: the scripts built on Rice's. Networks and schedules are ours: the authors of Fair-ARD,
# who report on SVHN, released scripts for CIFAR-10 alone.
SVHN: dict[str, Any] = dict(dataset="svhn", padding=0, flip=False, attack_step=1 / 255, lr=0.01)
TINY_IMAGENET: dict[str, Any] = dict(
    dataset="tiny-imagenet",
    teacher_model="preact_resnet34",
    teacher_recipe="trades:tiny_imagenet_preact_resnet34",
    holdout_per_class=10,
    epochs=100,  # the schedule reported for this data set; the authors released no script
    lr_drops=(75, 90),
    select_always_from=75,
)
# The schedule and attack of Salmon et al. (NeurIPS 2020) on all of ImageNet; here a folder of 100 of its classes.
IMAGENET100: dict[str, Any] = dict(
    dataset="folder",
    image_size=224,
    max_side=256,
    augment="resized-crop",
    eps=4 / 255,
    attack_steps=3,
    attack_step=8 / 765,
    attack_start="uniform",
    batch_size=512,
    epochs=90,
    lr_drops=(30, 60),
    weight_decay=1e-4,
    holdout_per_class=10,
    select_always_from=60,
)
