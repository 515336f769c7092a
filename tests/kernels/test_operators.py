"""The registration of operators: what PyTorch knows of them, and what they tell autograd."""

import pytest
import torch

from retemper.kernels import class_temperature_js, epilogue, pgd_step_
from retemper.kernels.operators import LIBRARY, NAMESPACE, overwritten


def test_every_operator_is_in_one_namespace_with_a_schema() -> None:
    names = {name.removeprefix(f"{NAMESPACE}::") for name in LIBRARY._op_defs}
    public = {"augment", "batch_norm_", "class_sums", "class_temperature_kl", "epilogue", "pgd_step_", "random_start_"}
    assert public <= names
    for name in names:
        schema = getattr(torch.ops.retemper, name).default._schema
        written = [argument.name for argument in schema.arguments if argument.alias_info is not None]
        assert bool(written) == name.endswith("_"), schema


@pytest.mark.parametrize("of_a_cpu", [False, True])
def test_a_backward_that_needs_what_was_overwritten_raises(
    of_a_cpu: bool, device: torch.device, request: pytest.FixtureRequest
) -> None:
    if of_a_cpu:
        request.getfixturevalue("reference_path")
    clean, weight = torch.rand(2, 3, device=device), torch.rand(2, 3, device=device, requires_grad=True)
    adv = clean.clone()
    product = (weight * adv).sum()
    pgd_step_(adv, torch.ones_like(adv), clean, 0.1, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_tensors_of_inference_have_no_version() -> None:
    with torch.inference_mode():
        overwritten(torch.zeros(1))


def test_tensors_of_inference_may_stand_beside_what_is_trained(device: torch.device) -> None:
    """A teacher's prediction, as many make it, and the constants of a folded network."""
    student = torch.randn(4, 10, device=device, requires_grad=True)
    image = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    with torch.inference_mode():
        teacher, shift = torch.randn(4, 10, device=device), torch.randn(3, device=device)
    for constant in (lambda tensor: tensor, torch.clone):
        loss = class_temperature_js(student, constant(teacher)) + epilogue(image, constant(shift), scale=shift).sum()
        loss.backward()
    for grad in (student.grad, image.grad):
        assert grad is not None and grad.isfinite().all() and grad.any()
