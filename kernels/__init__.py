"""The fused operations: Triton on a GPU, plain PyTorch on a CPU, one contract for both.

An operation has a module of its name: its formula, its operators and what users call. Where that is not all, its
arithmetic is beside it: NAME_kernels.py has it in Triton; ascent.py and ascent_kernels.py are of pgd_step.py; noise.py
and philox.py of random_start.py; view_draws.py of strong_augment.py and resized_crop.py; kl_arguments.py,
kl_divergence.py and kl_kernel.py of class_temperature_kl.py; js_kernel.py of jensen_shannon.py. What they share is in
runtime.py, launch.py, operators.py and language.py; in pixels.py for images; in rows.py, logit_rows.py and numerics.py
for logits. What a training step alone needs, for all tensors of a network at once, is in fold_weights.py,
moved_weights.py, guard.py and tables.py. modules.py has the operations as torch.nn.Module, and patches.py puts them
into torchattacks.
"""

from retemper.kernels.ascent import pgd_step_reference
from retemper.kernels.augment import augment, augment_reference, identity_view, num_views
from retemper.kernels.batch_norm import batch_norm, batch_norm_reference, batch_norm_twice
from retemper.kernels.class_pair import class_pair, class_pair_reference
from retemper.kernels.class_sums import class_sums, class_sums_reference
from retemper.kernels.class_temperature_kl import class_temperature_kl, class_temperature_kl_grad_
from retemper.kernels.epilogue import epilogue, epilogue_reference
from retemper.kernels.jensen_shannon import class_temperature_js, class_temperature_js_reference
from retemper.kernels.kl_divergence import class_temperature_kl_grad_reference, class_temperature_kl_reference
from retemper.kernels.modules import ClassTemperatureJS, ClassTemperatureKL, PgdStep, RandomStart
from retemper.kernels.patches import patch_torchattacks
from retemper.kernels.pgd_step import pgd_step_
from retemper.kernels.philox import philox_reference
from retemper.kernels.random_start import random_start_, random_start_reference
from retemper.kernels.resized_crop import resized_crop, resized_crop_reference
from retemper.kernels.strong_augment import strong_augment, strong_augment_reference

__all__ = [
    "ClassTemperatureJS",
    "ClassTemperatureKL",
    "PgdStep",
    "RandomStart",
    "augment",
    "augment_reference",
    "batch_norm",
    "batch_norm_reference",
    "batch_norm_twice",
    "class_pair",
    "class_pair_reference",
    "class_sums",
    "class_sums_reference",
    "class_temperature_js",
    "class_temperature_js_reference",
    "class_temperature_kl",
    "class_temperature_kl_grad_",
    "class_temperature_kl_grad_reference",
    "class_temperature_kl_reference",
    "epilogue",
    "epilogue_reference",
    "identity_view",
    "num_views",
    "patch_torchattacks",
    "pgd_step_",
    "pgd_step_reference",
    "philox_reference",
    "random_start_",
    "random_start_reference",
    "resized_crop",
    "resized_crop_reference",
    "strong_augment",
    "strong_augment_reference",
]
