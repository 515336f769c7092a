"""Every op inside one captured graph: nothing waits for the device, and a replay draws anew."""

import pytest
import torch
from torch import Tensor

from retemper.kernels import (
    augment,
    batch_norm,
    class_sums,
    class_temperature_kl,
    class_temperature_kl_grad_,
    epilogue,
    pgd_step_,
    random_start_,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def step(image: Tensor, view: Tensor, label: Tensor, seed: Tensor, weight: Tensor) -> list[Tensor]:
    """Make one attack step on a linear model, with every op in it; it advances the seed."""
    by_class = torch.ones(weight.shape[1], device=weight.device)
    clean = augment(image, view)
    adv = random_start_(torch.empty_like(clean), clean, 8 / 255, seed=seed)
    student, teacher = adv.flatten(1) @ weight, clean.flatten(1) @ weight
    loss = class_temperature_kl(student, teacher, label, by_class)
    sums = class_sums(student, label, weight.shape[1])
    grad = class_temperature_kl_grad_(student, teacher, label, by_class) @ weight.t()
    grad = grad.view(adv.shape).contiguous(memory_format=torch.channels_last)
    pgd_step_(adv, grad, clean, 2 / 255, 8 / 255)
    shift = weight[:3, 0].contiguous()
    x = adv.detach().requires_grad_()
    out = epilogue(x, shift, scale=shift, residual=clean)
    running = [torch.zeros_like(shift), torch.ones_like(shift), torch.zeros_like(seed)]
    out = batch_norm(out, shift, shift, running, groups=2, residual=clean, relu=True)
    (x_grad,) = torch.autograd.grad(out.square().sum(), x)
    seed += 1
    return [adv, loss, *sums, out.detach(), x_grad]


def test_a_replay_is_a_fresh_run(device: torch.device) -> None:
    image = torch.randint(256, (16, 8, 8, 3), dtype=torch.uint8, device=device)
    view, label = (torch.arange(16, device=device) % n for n in (162, 10))
    weight = torch.randn(192, 10, device=device)
    seeds = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2)]
    expected = [[t.clone() for t in step(image, view, label, seeds[0], weight)] for _ in range(4)]

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step(image, view, label, seeds[1], weight)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(image, view, label, seeds[1], weight)
    for run in expected[1:]:  # the first was the warm-up; capturing runs nothing
        graph.replay()
        for ours, theirs in zip(out, run, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert not torch.equal(expected[1][0], expected[2][0])
