"""The settings that methods are run under, so that under one name they differ in the method alone.

A recipe file says `SETTINGS = distillation(TheMethod)`. The full-size settings are the authors' (ABSLD and RSLAD: 300
epochs, batches of 128, SGD 0.1 / 0.9 / 2e-4, drops after 215, 260 and 285); the small ones are ours, for a CPU.
"""

from collections.abc import Mapping
from typing import Any

from retemper.engine.recipe import UNTRAINED, Method, Recipe, Setting
from retemper.recipes.data_sets import (
    CIFAR10,
    CIFAR10_SMALL,
    CIFAR100,
    DIGITS,
    FASHION,
    FASHION_SMALL,
    IMAGENET100,
    SMALL,
    SVHN,
    TINY_IMAGENET,
)

ON_DIGITS = {"digits": "3 seeds on a 2-core CPU: docs/fairness.md"}
ON_BOTH = ON_DIGITS | {"fashion_mnist_small": "3 seeds on a 2-core CPU: docs/fairness.md"}

DISTILLATION: dict[str, tuple[str, dict[str, Any]]] = {
    "digits": (
        "8x8 digits, half a minute on one core once there is a teacher",
        DIGITS
        | dict(
            student="tiny_resnet", teacher_model="tiny_resnet_wide", teacher_recipe="sat:digits", train_teacher=True
        ),
    ),
    "fashion_mnist_small": (
        "Fashion-MNIST at 14 x 14, 2,000 images a class, a small student: minutes on one core",
        FASHION_SMALL
        | dict(
            student="tiny_resnet",
            teacher_model="tiny_resnet_wide",
            teacher_recipe="sat:fashion_mnist_small",
            train_teacher=True,
        ),
    ),
    "cifar10_small": (
        "CIFAR-10, a small student: about twenty minutes on one core",
        CIFAR10_SMALL
        | dict(
            student="small_resnet",
            teacher_model="small_resnet_wide",
            teacher_recipe="sat:cifar10_small",
            train_teacher=True,
        ),
    ),
    "fashion_mnist_resnet18": (
        "Fashion-MNIST, ResNet-18, for a GPU",
        FASHION
        | dict(
            student="resnet18",
            teacher_model="preact_resnet18",
            teacher_recipe="sat:fashion_mnist_preact_resnet18",
            epochs=60,
            lr_drops=(43, 52, 57),
            select_every=5,
            select_always_from=43,
        ),
    ),
    "cifar10_resnet18": ("CIFAR-10, ResNet-18, the authors' setting", CIFAR10 | dict(student="resnet18")),
    "cifar10_mobilenet_v2": ("CIFAR-10, MobileNetV2", CIFAR10 | dict(student="mobilenet_v2")),
    "cifar100_resnet18": ("CIFAR-100, ResNet-18", CIFAR100 | dict(student="resnet18")),
    "svhn_resnet18": (
        "SVHN, ResNet-18, at Rice's learning rate for it",
        SVHN | dict(student="resnet18", teacher_model="wrn34_10", teacher_recipe="trades:svhn_wrn34_10"),
    ),
    "tiny_imagenet_preact_resnet18": (
        "Tiny-ImageNet, PreActResNet-18",
        TINY_IMAGENET | dict(student="preact_resnet18"),
    ),
    "imagenet100_resnet18": (
        "a folder of 100 classes of ImageNet, ResNet-18 at 224 px, for GPUs",
        IMAGENET100
        | dict(
            student="imagenet_resnet18", teacher_model="imagenet_resnet50", teacher_recipe="sat:imagenet100_resnet50"
        ),
    ),
}


CLEAN_TEACHERS: dict[str, tuple[str, str]] = {  # of the methods that have a second, clean teacher: model and recipe
    "digits": ("tiny_resnet_wide", "sat:digits_clean"),
    "fashion_mnist_small": ("tiny_resnet_wide", "sat:fashion_mnist_small_clean"),
    "cifar10_small": ("small_resnet_wide", "sat:cifar10_small_clean"),
    "fashion_mnist_resnet18": ("preact_resnet18", "sat:fashion_mnist_preact_resnet18_clean"),
    "cifar10_resnet18": ("resnet56", "sat:cifar10_resnet56_clean"),
    "cifar10_mobilenet_v2": ("resnet56", "sat:cifar10_resnet56_clean"),
    "cifar100_resnet18": ("resnet18", "sat:cifar100_resnet18_clean"),
    "svhn_resnet18": ("resnet56", "sat:svhn_resnet56_clean"),
    "tiny_imagenet_preact_resnet18": ("preact_resnet34", "sat:tiny_imagenet_preact_resnet34_clean"),
    "imagenet100_resnet18": ("imagenet_resnet50", "sat:imagenet100_resnet50_clean"),
}


# what `released` sets in RSLAD and the methods after it: their scripts train on all training images, and judge the test
# images by 20 steps of 0.003, at 8/255
JUDGED_ON_TEST: Mapping[str, Any] = dict(select_on="test", select_step=0.003 * 255 / 8, precision="fp32")
# and in SAT's, IAD's and AdaAD's: the best of all epochs by its average on test images under 10 steps of eps/4
BY_PGD_10: Mapping[str, Any] = dict(
    select_on="test", select_by="robust", select_steps=10, select_every=1, select_from=1, precision="fp32"
)
NO_OPTIONS: Mapping[str, Any] = {}
NO_STATUS: Mapping[str, str] = {}
NO_TEACHERS: Mapping[str, tuple[str, str]] = {}


def _settings(
    method: type[Method],
    table: Mapping[str, tuple[str, Mapping[str, Any]]],
    authors: Mapping[str, Any],
    status: Mapping[str, str],
    changes: Mapping[str, Mapping[str, Any]],
) -> dict[str, Setting]:
    assert (status.keys() | changes.keys()) <= table.keys() | {"small"}, (status, changes)
    small = dict.fromkeys(SMALL, changes.get("small", NO_OPTIONS))
    return {
        name: Setting(
            recipe=Recipe.of(
                method, **{**authors, **options, **small.get(name, NO_OPTIONS), **changes.get(name, NO_OPTIONS)}
            ),
            note=note,
            status=status.get(name, UNTRAINED),
        )
        for name, (note, options) in table.items()
    }


def distillation(
    method: type[Method],
    authors: Mapping[str, Any] = NO_OPTIONS,
    status: Mapping[str, str] = NO_STATUS,
    *,
    own_teachers: Mapping[str, tuple[str, str]] = NO_TEACHERS,
    **changes: Mapping[str, Any],
) -> dict[str, Setting]:
    """Return every setting of the distillation methods, for `method`.

    Args:
        authors: the options that the method's authors have otherwise, where the setting does not say.
        status: what was measured, by setting.
        own_teachers: the teachers, model and recipe, that the authors themselves have in a setting; it is there with
            either, theirs under a name of its own.
        changes: the options that the method has otherwise, by setting; "small" stands for those of `SMALL`.
    """
    table = dict(DISTILLATION)
    if method.clean_teacher_sees:
        for name, (model, trained_by) in CLEAN_TEACHERS.items():
            note, options = table[name]
            table[name] = note, {**options, "clean_teacher_model": model, "clean_teacher_recipe": trained_by}
    for name, (model, trained_by) in own_teachers.items():
        note, options = table[name]
        teacher = {"teacher_model": model, "teacher_recipe": trained_by}
        table[f"{name}_authors_teacher"] = f"{note}, under their own teacher: {trained_by}", options | teacher
    return _settings(method, table, authors, status, changes)


# no attack, in training or in choosing the best epoch
CLEAN: dict[str, Any] = dict(attack_steps=0, attack_start="none", select_steps=0)
CLEAN_200: dict[str, Any] = CLEAN | dict(epochs=200, lr_drops=(100, 150), select_always_from=150)
FASHION_TEACHER: dict[str, Any] = FASHION | dict(
    student="preact_resnet18", epochs=30, lr_drops=(20, 27), select_every=5, select_always_from=20
)
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "digits": (
        "8x8 digits: the robust teacher of the digits settings, under a minute on one core",
        DIGITS | dict(student="tiny_resnet_wide"),
    ),
    "fashion_mnist_small": (
        "Fashion-MNIST: the robust teacher of fashion_mnist_small",
        FASHION_SMALL | dict(student="tiny_resnet_wide"),
    ),
    "cifar10_small": (
        "CIFAR-10: the robust teacher of cifar10_small, four times as large as the student",
        CIFAR10_SMALL | dict(student="small_resnet_wide"),
    ),
    "fashion_mnist_preact_resnet18": (
        "Fashion-MNIST: the robust teacher of fashion_mnist_resnet18, for a GPU",
        FASHION_TEACHER,
    ),
    "imagenet100_resnet50": (
        "a folder of 100 classes of ImageNet, ResNet-50 at 224 px: a robust teacher, for GPUs",
        IMAGENET100 | dict(student="imagenet_resnet50"),
    ),
    "imagenet100_resnet50_clean": (
        "a folder of 100 classes of ImageNet, ResNet-50 at 224 px, no attack: a clean teacher, for GPUs",
        IMAGENET100 | CLEAN | dict(student="imagenet_resnet50"),
    ),
    "digits_clean": (
        "8x8 digits, no attack: the clean teacher of the digits settings, seconds on one core",
        DIGITS | CLEAN | dict(student="tiny_resnet_wide"),
    ),
    "fashion_mnist_small_clean": (
        "Fashion-MNIST, no attack: the clean teacher of fashion_mnist_small",
        FASHION_SMALL | CLEAN | dict(student="tiny_resnet_wide"),
    ),
    "cifar10_small_clean": (
        "CIFAR-10, no attack: the clean teacher of cifar10_small",
        CIFAR10_SMALL | CLEAN | dict(student="small_resnet_wide"),
    ),
    "fashion_mnist_preact_resnet18_clean": (
        "Fashion-MNIST, no attack: the clean teacher of fashion_mnist_resnet18, for a GPU",
        FASHION_TEACHER | CLEAN | dict(select_always_from=27),
    ),
    "cifar10_resnet56_clean": (
        "CIFAR-10, ResNet-56, no attack: the clean teacher of MTARD's kind, for a GPU",
        CLEAN_200 | dict(dataset="cifar10", student="resnet56"),
    ),
    "cifar100_resnet18_clean": (
        "CIFAR-100, ResNet-18, no attack: a clean teacher, for a GPU",
        CLEAN_200 | dict(dataset="cifar100", student="resnet18", holdout_per_class=10),
    ),
    "svhn_resnet56_clean": (
        "SVHN, ResNet-56, no attack: a clean teacher, for a GPU",
        SVHN | CLEAN_200 | dict(student="resnet56"),
    ),
    "tiny_imagenet_preact_resnet34_clean": (
        "Tiny-ImageNet, PreActResNet-34, no attack: a clean teacher, for a GPU",
        CLEAN
        | dict(
            dataset="tiny-imagenet",
            student="preact_resnet34",
            holdout_per_class=10,
            epochs=100,
            lr_drops=(75, 90),
            select_always_from=75,
        ),
    ),
}


def teachers(
    method: type[Method], status: Mapping[str, str], authors: Mapping[str, Any] = NO_OPTIONS, **options: Any
) -> dict[str, Setting]:
    """Return the settings that train the teachers of the settings above, robust and clean, by `method`.

    Args:
        status: what was measured, by setting.
        authors: as `distillation` takes them.
        options: the options that the method has otherwise in all of them.
    """
    return _settings(method, TEACHERS, authors, status, dict.fromkeys(TEACHERS, options))


ADVERSARIAL_TRAINING: dict[str, tuple[str, dict[str, Any]]] = {
    "digits": ("8x8 digits, half a minute on one core", DIGITS | dict(student="tiny_resnet")),
    "fashion_mnist_small": (
        "Fashion-MNIST at 14 x 14, 2,000 images a class, a small student: minutes on one core",
        FASHION_SMALL | dict(student="tiny_resnet"),
    ),
    "cifar10_small": (
        "CIFAR-10, a small student: about twenty minutes on one core",
        CIFAR10_SMALL | dict(student="small_resnet"),
    ),
    "fashion_mnist_resnet18": (
        "Fashion-MNIST, ResNet-18, for a GPU",
        FASHION | dict(student="resnet18", epochs=60, lr_drops=(43, 52, 57), select_every=5, select_always_from=43),
    ),
    "cifar10_resnet18": ("CIFAR-10, ResNet-18, the authors' schedule", dict(dataset="cifar10", student="resnet18")),
    "cifar10_preact_resnet18": (
        "CIFAR-10, PreActResNet-18, the authors' schedule",
        dict(dataset="cifar10", student="preact_resnet18"),
    ),
    "cifar100_resnet18": (
        "CIFAR-100, ResNet-18, the schedule of CIFAR-10",
        dict(dataset="cifar100", student="resnet18", holdout_per_class=10),
    ),
    "svhn_resnet18": ("SVHN, ResNet-18, at Rice's learning rate for it", SVHN | dict(student="resnet18")),
    "tiny_imagenet_preact_resnet18": (
        "Tiny-ImageNet, PreActResNet-18",
        dict(
            dataset="tiny-imagenet",
            student="preact_resnet18",
            holdout_per_class=10,
            epochs=100,
            lr_drops=(75, 90),
            select_always_from=75,
        ),
    ),
    "imagenet100_resnet18": (
        "a folder of 100 classes of ImageNet, ResNet-18 at 224 px, for GPUs",
        IMAGENET100 | dict(student="imagenet_resnet18"),
    ),
}

# of CSR's authors, on top of TRADES; theirs on top of AWP has ten times the rate
TWO_EPOCHS: dict[str, dict[str, Any]] = {
    name: dict(epochs=2, lr=0.001, lr_drops=(), weight_decay=5e-4, select_every=1, select_from=1, select_always_from=1)
    for name in ADVERSARIAL_TRAINING
}


def as_student(name: str) -> str:
    """Return the setting of SAT and TRADES with the student of setting `name`: their small ones train the teachers."""
    return f"{name}_student" if name in ("digits", *SMALL) else name


def adversarial_training(
    method: type[Method],
    authors: Mapping[str, Any] = NO_OPTIONS,
    status: Mapping[str, str] = NO_STATUS,
    *,
    from_robust: str | None = None,
    **changes: Mapping[str, Any],
) -> dict[str, Setting]:
    """Return every setting of the methods without a teacher, for `method`.

    Args:
        authors, status, changes: as `distillation` takes them.
        from_robust: the method fine-tunes a student that this one has trained, which the small settings train first.
    """
    table = dict(ADVERSARIAL_TRAINING)
    if from_robust:
        for name, (note, options) in table.items():
            start = dict(start_recipe=f"{from_robust}:{as_student(name)}", train_teacher=as_student(name) != name)
            table[name] = note, {**options, **start}
    return _settings(method, table, authors, status, changes)
