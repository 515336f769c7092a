"""The draws of view_draws.py in Triton, with the same roundings: whole numbers where those are whole, else float32 or
float64, of which there are but sums, products, quotients and roots.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# (Triton declares that static_range never returns, and that a constant is no number.)

from retemper.kernels.language import tl, triton
from retemper.kernels.view_draws import (
    BRIGHTNESS,
    CONTRAST,
    CROP_TRIES,
    DEGREE,
    ERASE,
    ERASE_LOW,
    ERASE_X,
    ERASE_Y,
    FIRST,
    FLIP,
    FROM_X,
    FROM_Y,
    HALF_LOG_LOW,
    HALF_LOG_RANGE,
    HALF_LOG_RATIO,
    NOTHING,
    OPERATION,
    ROTATE,
    SECOND,
    SHEAR,
    SHEAR_LOW,
    SIGN,
    STEP,
    STRENGTH,
    TONE_LOW,
    TONE_RANGE,
    TRIES,
    TRY,
    WIDE_LOW,
    WIDE_RANGE,
)

WORD = tl.constexpr(2**64 - 1)


@triton.jit
def word_of(view, place: tl.constexpr):
    """Return the upper half of one of the words that a view seeds, int64."""
    word = view.to(tl.uint64, bitcast=True) + ((place + 1) * STEP & WORD)
    word = (word ^ (word >> 30)) * FIRST
    word = (word ^ (word >> 27)) * SECOND
    return ((word ^ (word >> 31)) >> 32).to(tl.int64)


@triton.jit
def below(word, number):
    """Return a whole number in 0 ... number - 1, int32."""
    return (word * number >> 32).to(tl.int32)


@triton.jit
def _wide(number: tl.constexpr):
    """Return a number in float64; one that Triton writes out may be rounded to float32."""
    return tl.full((), number, tl.float64)


@triton.jit
def crop(view, AT: tl.constexpr, SIDE: tl.constexpr, PADDING: tl.constexpr, MODE: tl.constexpr):
    """Return the shift of a crop in one direction, and the first and the last place that it leaves, exclusive."""
    shift = tl.where(view >= 0, below(word_of(view, AT), 2 * PADDING + 1) - PADDING, 0)
    first, last = shift * 0, shift * 0 + SIDE
    if MODE != "reflect":
        first, last = tl.maximum(-shift, 0), tl.minimum(SIDE - shift, SIDE)
    return shift, first, last


@triton.jit
def shift(view, AT: tl.constexpr, TO: tl.constexpr, SIDE: tl.constexpr, lost):
    """Return what `_crop` returns, of CropShift, where `lost` lines are cut off."""
    first, begin = below(word_of(view, AT), lost + 1), below(word_of(view, TO), lost + 1)
    return first - begin, begin, begin + SIDE - lost


@triton.jit
def operation_of(view, UNTIL: tl.constexpr):
    """Return the operation."""
    operation = (view >> 63).to(tl.int32) * 0
    word = word_of(view, OPERATION)
    for k in tl.static_range(len(UNTIL)):
        operation += (word >= UNTIL[k]).to(tl.int32)
    return tl.where(view >= 0, operation, NOTHING)


@triton.jit
def strength_of(view, operation):
    """Return the factor of a colour operation, float32."""
    unit = (word_of(view, STRENGTH) >> 8).to(tl.float32) * 2.0**-24
    tone = (operation == BRIGHTNESS) | (operation == CONTRAST)
    return tl.where(tone, unit * TONE_RANGE + TONE_LOW, unit * WIDE_RANGE + WIDE_LOW)


@triton.jit
def _sine_cosine(angle):
    """Return both of a float64 angle up to 0.6, by series."""
    square = angle * angle
    sine, cosine = angle * 0 + 1, angle * 0 + 1
    for k in tl.static_range(8, 0, -1):
        sine = 1 - square * sine * _wide(1 / (2 * k * (2 * k + 1)))
        cosine = 1 - square * cosine * _wide(1 / (2 * k * (2 * k - 1)))
    return sine * angle, cosine


@triton.jit
def turn(view, operation, SHEAR_RANGE: tl.constexpr, TURNS: tl.constexpr):
    """Return what turns or shears the image, in units of 2**-32: how far x goes by x, x by y, and y by x; int64."""
    scale, x_by_y = view * 0 + 2**32, view * 0
    y_by_x = x_by_y
    if (operation == SHEAR) | (operation == ROTATE):
        word, sign = word_of(view, STRENGTH), below(word_of(view, SIGN), 4).to(tl.int64)
        way = 1 - 2 * (sign & 1)
        angle = (word >> 8).to(tl.float64) * 2.0**-24 * _wide(SHEAR_RANGE) + _wide(SHEAR_LOW)
        if operation == ROTATE:
            angle = (below(word, TURNS) + 1).to(tl.float64) * _wide(DEGREE)
        sine, cosine = _sine_cosine(angle)
        if operation == ROTATE:
            y_by_x = tl.floor(sine * 2.0**32 + 0.5).to(tl.int64) * way
            x_by_y = -y_by_x
            scale = tl.floor(cosine * 2.0**32 + 0.5).to(tl.int64)
        else:
            slope = tl.floor(sine / cosine * 2.0**16 + 0.5).to(tl.int64) * way << 16
            x_by_y, y_by_x = slope * (sign >> 1), slope * (1 - (sign >> 1))
    return scale, x_by_y, y_by_x


@triton.jit
def fixed(number, BITS: tl.constexpr):
    """Return a number divided by 2**BITS, rounded half up, int32."""
    return (number + (1 << BITS - 1) >> BITS).to(tl.int32)


@triton.jit
def begin(scale, skew, SIDE: tl.constexpr, OTHER: tl.constexpr):
    """Return where the first place of an axis begins, in units of 2**-16, int32."""
    return fixed(scale * 0 + SIDE * 2**32 - scale * (SIDE - 1) - skew * (OTHER - 1), 17)


@triton.jit
def _exponential(power):
    """Return e**power of a float32 power up to 0.61, by its series."""
    result = power * 0 + 1
    for k in tl.static_range(8, 0, -1):
        result = 1 + power * result * (1 / k)
    return result


@triton.jit
def erased(view, SHARE: tl.constexpr, RANGE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Return the first row and column, the height and the width of the rectangle that is erased; 0 by 0 for none."""
    height = (view >> 63).to(tl.int32) * 0
    width = height
    wanted = (word_of(view, ERASE) < SHARE) & (view >= 0)
    for k in tl.static_range(TRIES):
        word = word_of(view, TRY + k)
        share = ((word >> 16).to(tl.float32) + 0.5) * 2.0**-16
        angle = ((word & 0xFFFF).to(tl.float32) + 0.5) * 2.0**-16 * HALF_LOG_RANGE + HALF_LOG_LOW
        side = tl.sqrt_rn((share * RANGE + ERASE_LOW) * (HEIGHT * WIDTH))
        tall = tl.floor(side * _exponential(angle) + 0.5).to(tl.int32)
        wide = tl.floor(side * _exponential(-angle) + 0.5).to(tl.int32)
        fits = (tall < HEIGHT) & (wide < WIDTH) & wanted
        height, width = tl.where(fits, tall, height), tl.where(fits, wide, width)
        wanted = wanted & (fits == 0)
    return (
        below(word_of(view, ERASE_Y), HEIGHT - height + 1),
        below(word_of(view, ERASE_X), WIDTH - width + 1),
        height,
        width,
    )


@triton.jit
def box(
    view,
    least,
    span,
    MIRROR: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    MOST_TALL: tl.constexpr,
    MOST_WIDE: tl.constexpr,
):
    """Return what a resized crop shows: whether it is mirrored, its first row and column, its height and width."""
    tall = (view >> 63).to(tl.int32) * 0 + MOST_TALL
    wide = tall * 0 + MOST_WIDE
    wanted = view >= 0
    for k in tl.static_range(CROP_TRIES):
        word = word_of(view, TRY + k)
        share = ((word >> 16).to(tl.float32) + 0.5) * 2.0**-16
        angle = ((word & 0xFFFF).to(tl.float32) + 0.5) * 2.0**-16 * (-2 * HALF_LOG_RATIO) + HALF_LOG_RATIO
        side = tl.sqrt_rn((share * span + least) * (HEIGHT * WIDTH))
        across = tl.floor(side * _exponential(angle) + 0.5).to(tl.int32)
        down = tl.floor(side * _exponential(-angle) + 0.5).to(tl.int32)
        fits = (down > 0) & (down <= HEIGHT) & (across > 0) & (across <= WIDTH) & wanted
        tall, wide = tl.where(fits, down, tall), tl.where(fits, across, wide)
        wanted = wanted & (fits == 0)
    top = tl.where(wanted, (HEIGHT - tall) // 2, below(word_of(view, FROM_Y), HEIGHT - tall + 1))
    left = tl.where(wanted, (WIDTH - wide) // 2, below(word_of(view, FROM_X), WIDTH - wide + 1))
    flip = below(word_of(view, FLIP), 2) if MIRROR else tall * 0
    plain = view < 0
    flip, tall, wide = tl.where(plain, 0, flip), tl.where(plain, SIZE, tall), tl.where(plain, SIZE, wide)
    return (
        flip,
        tl.where(plain, (HEIGHT - SIZE) // 2, top),
        tl.where(plain, (WIDTH - SIZE) // 2, left),
        tall,
        wide,
    )
