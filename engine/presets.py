"""Presets: how strongly a run trains, whatever its method. `--preset strong` beside `--variant`; what is typed wins.

    paper     each setting as it stands: the authors' training, or ours in its place
    strong    a recipe moves results more than most methods do (CIFAR-100, ARD: 20.2 to 26.4), so all methods may take
              one. The learning rate goes up and down once (FastAT's benchmark), weight decay is 5e-4 and spares batch
              norm (Wang et al., ICML 2023), an average of the weights is kept (EMA with a warm-up: the same), the
              weights are perturbed (AWP, NeurIPS 2020) after a twentieth of the epochs, labels are smoothed by 0.1
              where the loss has any, and images are cropped by CropShift, or are IDBH's (Li and Spratling, ICLR 2023)

Epochs, batches, the peak of the learning rate, the attack, and what a method has of an average or a perturbation of its
own stay as they are. Small images are augmented as before, and large ones by a resized crop.
"""

from typing import Any

from retemper.engine.groups import Data, Optimisation
from retemper.options import options_of

WARM_SHARE = 20  # AWP begins after one of so many parts of the run, as at the 10th of its authors' 200 epochs
SMALL_PX = 16  # a side: below it a crop by ten in 32 lines leaves too little
SHORT = 20  # epochs: a longer average of so few would hold their beginning
# a run's last 2 to 5 percent of steps: of 940, 1,530 and 3,900 in the settings for a CPU, else of 20,000 to 120,000
DECAY = {"digits": 0.97, "small": 0.98, "short": 0.99, "whole": 0.999}
IDBH = {"svhn": "idbh-svhn", "cifar10": "idbh-weak", "cifar100": "idbh-weak", "tiny-imagenet": "idbh-weak"}


def preset_options(preset: str, data: Data, optim: Optimisation, smooths_labels: bool) -> dict[str, Any]:
    """Return the options, by flat name, that a preset sets.

    Args:
        preset: "paper" or "strong".
        data, optim: the setting's own, with the data set and the epochs of the run.
        smooths_labels: whether the method's loss has labels to smooth.
    """
    if preset == "paper":
        return {}
    options: dict[str, Any] = dict(lr_schedule="onecycle", weight_decay=5e-4, decay_norms=False)
    if smooths_labels:
        options["label_smoothing"] = 0.1
    if optim.average == "none":
        options |= dict(average="ema", ema_decay=_decay(data, optim.epochs), ema_warmup=True)
    if not optim.awp_gamma:
        first = 1 + max(1, round(optim.epochs / WARM_SHARE))
        options |= dict(awp_gamma=0.005, awp_from=min(first, optim.epochs))
    if "augment" in options_of(Data) and data.augment != "resized-crop" and not _is_small(data):
        options["augment"] = IDBH.get(data.dataset, "cropshift")
    return options


def _is_small(data: Data) -> bool:
    return data.dataset == "digits" or (data.image_size is not None and data.image_size <= SMALL_PX)


def _decay(data: Data, epochs: int) -> float:
    """Return the decay a step of the average of the weights."""
    if data.dataset == "digits":
        return DECAY["digits"]
    return DECAY["small" if _is_small(data) else "short" if epochs <= SHORT else "whole"]
