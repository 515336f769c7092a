"""How the learning rate moves within a run: at each step, the factor on its peak.

i is the step of the run, from 0, of N; w are the steps of the warm-up, p the share of the run after which the peak is
reached.

    steps      the product of the drops so far
    cosine     (1 + cos(pi (i - w) / (N - w))) / 2                           (Loshchilov and Hutter, ICLR 2017)
    warm-up    of these two: times (i + 1) / w in the first w steps          (Goyal et al., 2017)
    onecycle   from 1/25 up to 1 at i = p N - 1, and down to 1/250,000 at the last step, each by half a cosine
               (Smith and Topin, 2018)
    triangle   from 0 up to 1 at (i + 1) / N = p, and down to 0 after the last step, each by a line
               (Smith, WACV 2017; Wong et al., ICLR 2020; Rice et al., ICML 2020)

`onecycle` is the rate of torch's OneCycleLR, which FastAT's benchmark takes by the epoch, and the authors of "Better
Diffusion Models Further Improve Adversarial Training" (ICML 2023) by the step or by the epoch; here it moves by the
step. torch moves the momentum too unless it is told not to; here it stays. `triangle` is Rice's `cyclic` with p = 0.4.
"""

from math import cos, pi

FIRST, LAST = 1 / 25, 1 / 25 / 1e4  # of onecycle


def cosine(step: float, steps: float) -> float:
    """Return the factor of `step`, from 0, of `steps` that fall by half a cosine."""
    return (1 + cos(pi * step / steps)) / 2


def onecycle(step: int, steps: int, peak: float) -> float:
    """Return the factor of `step`, from 0, of `steps`; `peak` is a share of them."""
    top = max(peak * steps - 1, 0.0)
    if step < top:
        return _between(FIRST, 1, step / top)
    return _between(1, LAST, (step - top) / max(steps - 1 - top, 1e-9))


def triangle(step: int, steps: int, peak: float) -> float:
    """Return the factor of `step`, from 0, of `steps`; `peak` is a share of them."""
    done = (step + 1) / steps
    return done / peak if done <= peak else (1 - done) / (1 - peak)


def _between(start: float, end: float, share: float) -> float:
    return end + (start - end) * cosine(share, 1)
