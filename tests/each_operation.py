"""Each operation once against plain PyTorch, for copies of the kernels in whatever place; needs torch alone."""

from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F


def run_each(kernels: ModuleType) -> dict[str, Tensor]:
    """Run each operation of the package `kernels` once, on a CPU.

    Returns:
        By the name of the operation what it gives.

    Raises:
        AssertionError: one does not do what plain PyTorch does.
    """
    generator = torch.Generator().manual_seed(0)
    clean, grad = torch.rand(2, 3, 5, 5, generator=generator), torch.randn(2, 3, 5, 5, generator=generator)
    student, teacher = torch.randn(2, 6, 4, generator=generator)
    label, temperature = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = {}

    found["random_start_"] = start = kernels.random_start_(torch.empty_like(clean), clean, 0.1, seed=7)
    assert start.min() >= 0 and start.max() <= 1 and 0.05 < (start - clean).abs().max() <= 0.1 + 1e-6

    found["pgd_step_"] = kernels.pgd_step_(start.clone(), grad, clean, 0.03, 0.1)
    moved = start + 0.03 * grad.sign()
    torch.testing.assert_close(found["pgd_step_"], moved.clamp(clean - 0.1, clean + 0.1).clamp(0, 1))

    target = (teacher / temperature[label, None]).softmax(1)
    student.requires_grad_()
    found["class_temperature_kl"] = loss = kernels.class_temperature_kl(student, teacher, label, temperature)
    torch.testing.assert_close(loss, F.kl_div(student.log_softmax(1), target, reduction="batchmean"))
    loss.backward()
    student = student.detach()
    found["class_temperature_kl_grad_"] = kernels.class_temperature_kl_grad_(
        student.clone(), teacher, label, temperature
    )
    torch.testing.assert_close(found["class_temperature_kl_grad_"], student.softmax(1) - target)

    found["class_temperature_js"] = kernels.class_temperature_js(student, teacher, label, temperature, beta=0.3)
    mixed = 0.3 * target + 0.7 * student.softmax(1)
    parts = [w * F.kl_div(mixed.log(), p, reduction="batchmean") for w, p in ((0.3, target), (0.7, student.softmax(1)))]
    torch.testing.assert_close(found["class_temperature_js"], sum(parts))

    found["class_pair"] = kernels.class_pair(student, teacher, target)
    apart = (student - teacher)[:, :, None] - (student - teacher)[:, None]
    pairs = (target[:, :, None] * target[:, None] * apart**2).sum((1, 2))
    torch.testing.assert_close(found["class_pair"], pairs.mean())

    found["class_sums"] = kernels.class_sums(student, label, 4)[0]
    each = F.cross_entropy(student, label, reduction="none")
    torch.testing.assert_close(found["class_sums"], torch.zeros(4).index_add(0, label, each))

    shift = torch.tensor([0.5, -0.5, 0.0])
    found["epilogue"] = kernels.epilogue(grad, shift)
    torch.testing.assert_close(found["epilogue"], (grad + shift[:, None, None]).relu())

    weight, bias = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([0.0, 0.5, 1.0])
    found["batch_norm"] = kernels.batch_norm(grad, weight, bias, groups=2)
    alone = [F.batch_norm(image, None, None, weight, bias, training=True) for image in grad.chunk(2)]
    torch.testing.assert_close(found["batch_norm"], torch.cat(alone))

    pixels = (clean.permute(0, 2, 3, 1) * 255).byte().contiguous()
    found["augment"] = kernels.augment(pixels, torch.full((2,), kernels.identity_view(4)))
    torch.testing.assert_close(found["augment"], pixels.permute(0, 3, 1, 2) / 255)

    found["strong_augment"] = kernels.strong_augment(pixels, torch.full((2,), -1), policy="idbh-strong")
    torch.testing.assert_close(found["strong_augment"], found["augment"])
    found["resized_crop"] = kernels.resized_crop(pixels, torch.full((2,), -1), size=pixels.shape[1])
    torch.testing.assert_close(found["resized_crop"], found["augment"])
    return found
