"""How launches of random starts are cut into programs; what they draw is in test_noise.py and test_random_start.py."""

import pytest
import torch

from retemper.kernels import noise_kernels
from retemper.kernels.noise_kernels import BLOCK

SEED = torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("shape", "rows", "cut"),
    [
        ((128, 3, 32, 32), (0, 1), (393216, None, 384)),  # one run
        ((128, 3, 32, 32), (1, 2), (3072, 3, 384)),  # rows of a larger batch: three programs a sample
        ((5, 3, 31, 33), (0, 1), (3069, 3, 15)),  # 8 does not divide a sample, which starts with a counter of its own
    ],
)
def test_a_batch_is_one_run_where_its_samples_are_whole_counters(
    shape: tuple[int, ...], rows: tuple[int, int], cut: tuple[int, int | None, int]
) -> None:
    adv = torch.empty(shape)
    launch = noise_kernels._prepared_uniform(adv, adv, SEED, 0.1, 0.0, 1.0, True, *rows)
    assert (launch.named["pixels"], launch.named["blocks"], *launch.grid) == cut


def test_a_radius_by_sample_needs_samples_apart() -> None:
    adv = torch.empty(128, 3, 32, 32)
    launch = noise_kernels._prepared_uniform(adv, adv, SEED, torch.ones(128, 1), 0.0, 1.0, True, 0, 1)
    assert launch.named["EPS"] == "sample" and launch.named["blocks"] == 3


def test_normal_noise_has_half_the_block_and_a_ball_one_program_a_sample() -> None:
    adv = torch.empty(128, 3, 32, 32)
    normal = noise_kernels._prepared_normal(adv, adv, SEED, 0.1, 0.0, 1.0, 0.01, True, 0, 1)
    assert normal.named["BLOCK"] == BLOCK // 2 and normal.grid == (128 * 3,)
    ball = noise_kernels._prepared_ball("uniform", adv, adv, SEED, 0.1, 0.0, 1.0, 0.01, True, 0, 1)
    assert ball.grid == (128,) and ball.named["NUMBERS"] == 3072 + 2
    with pytest.raises(ValueError, match="leave holes"):
        noise_kernels._prepared_ball("normal", adv[..., ::2], adv, SEED, 0.1, 0.0, 1.0)
