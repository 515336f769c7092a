"""The kernel of strong_augment.py: a program draws what its view shows, and makes that image.

It goes over the image once. Contrast, autocontrast and equalize ask for statistics of the whole image first, and so go
over it twice: it has come to the cache then. Whatever gives each byte another one is a table. All is rounded as in
strong_augment.py.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportPossiblyUnboundVariable=false
# (Triton declares that static_range never returns, and that a constant is no number.)

from retemper.kernels.augment import REST, WHOLE, reflected
from retemper.kernels.language import tl, triton
from retemper.kernels.view_draw_kernels import (
    begin,
    below,
    crop,
    erased,
    fixed,
    operation_of,
    shift,
    strength_of,
    turn,
    word_of,
)
from retemper.kernels.view_draws import (
    AUTOCONTRAST,
    BRIGHTNESS,
    COLOR,
    CONTRAST,
    CUT,
    CUT_X,
    CUTOUT_X,
    CUTOUT_Y,
    EQUALIZE,
    FLIP,
    FROM_X,
    FROM_Y,
    SHARPNESS,
    TO_X,
    TO_Y,
)

# The values that a program makes at a time, and its warps: 8 values a thread. Not yet measured on a GPU.
BLOCK = 2048
WARPS = 8

RED, GREEN, BLUE = tl.constexpr(19595), tl.constexpr(38470), tl.constexpr(7471)  # in grey, of 2**16


@triton.jit
def _places(start, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the rows, the columns and the channels of BLOCK values that lie side by side."""
    value = start + tl.arange(0, BLOCK)
    pixel = value // CHANNELS
    return pixel // WIDTH, pixel % WIDTH, value % CHANNELS


@triton.jit
def _pixel(image_ptr, frame, y, x, channel, HEIGHT, WIDTH, CHANNELS, MODE, TURNING):
    """Return the bytes of the mirrored, cropped and turned image at some places, int32."""
    flip, shift_x, left, right, shift_y, top, bottom, begin_x, begin_y, scale, x_by_y, y_by_x = frame
    if TURNING:
        across = begin_x + scale * x + x_by_y * y >> 16
        y = begin_y + y_by_x * x + scale * y >> 16
        x = across
    inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
    x, y = x + shift_x, y + shift_y
    x = tl.where(flip == 1, WIDTH - 1 - x, x)
    if MODE == "reflect":
        x, y = reflected(x, WIDTH - 1), reflected(y, HEIGHT - 1)
    return tl.load(image_ptr + ((y * WIDTH + x) * CHANNELS + channel), mask=inside, other=0).to(tl.int32)


@triton.jit
def _grey(image_ptr, frame, y, x, HEIGHT, WIDTH, CHANNELS, MODE):
    """Return the grey of the image at some places, int32; of one channel, itself."""
    grey = _pixel(image_ptr, frame, y, x, 0, HEIGHT, WIDTH, CHANNELS, MODE, True)
    if CHANNELS == 3:
        green = _pixel(image_ptr, frame, y, x, 1, HEIGHT, WIDTH, CHANNELS, MODE, True)
        blue = _pixel(image_ptr, frame, y, x, 2, HEIGHT, WIDTH, CHANNELS, MODE, True)
        grey = grey * RED + green * GREEN + blue * BLUE + 32768 >> 16
    return grey


@triton.jit
def _smooth(image_ptr, frame, y, x, channel, HEIGHT, WIDTH, CHANNELS, MODE):
    """Return the image smoothed by its neighbours at some places, int32; the border stays as it is."""
    value = _pixel(image_ptr, frame, y, x, channel, HEIGHT, WIDTH, CHANNELS, MODE, True)
    total = 4 * value
    for at in range(9):  # not unrolled: a program would keep nine addresses of each value
        down, along = at // 3 - 1, at % 3 - 1
        total += _pixel(image_ptr, frame, y + down, x + along, channel, HEIGHT, WIDTH, CHANNELS, MODE, True)
    inner = (y > 0) & (y < HEIGHT - 1) & (x > 0) & (x < WIDTH - 1)
    return tl.where(inner, (2 * total + 13) // 26, value)


@triton.jit
def _blend(worst, value, strength):
    """Return bytes as far beyond `worst` as `strength` says, int32: 0 gives `worst`, 1 gives `value`."""
    mixed = worst.to(tl.float32) + strength * (value - worst).to(tl.float32)
    return tl.minimum(tl.maximum(mixed, 0.0), 255.0).to(tl.int32)


@triton.jit
def _mean(image_ptr, frame, HEIGHT, WIDTH, CHANNELS, MODE, BLOCK: tl.constexpr):
    """Return the mean grey of the image, rounded, int32."""
    pixels: tl.constexpr = HEIGHT * WIDTH
    total = tl.zeros((), tl.int64)
    for start in range(0, pixels, BLOCK):
        y, x, _ = _places(start, WIDTH, 1, BLOCK)
        total += tl.sum(_grey(image_ptr, frame, y, x, HEIGHT, WIDTH, CHANNELS, MODE)).to(tl.int64)
    return ((2 * total + pixels) // (2 * pixels)).to(tl.int32)


@triton.jit
def _counts(image_ptr, frame, HEIGHT, WIDTH, CHANNELS, MODE, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Return how often each byte occurs in each channel, (ROWS, 256) int32, rows of 0 after the channels."""
    count = tl.zeros((ROWS * 256,), tl.int32)
    for start in range(0, HEIGHT * WIDTH * CHANNELS, BLOCK):
        y, x, channel = _places(start, WIDTH, CHANNELS, BLOCK)
        value = _pixel(image_ptr, frame, y, x, channel, HEIGHT, WIDTH, CHANNELS, MODE, True)
        count += tl.histogram(value + 256 * channel, ROWS * 256, mask=y < HEIGHT)
    return tl.reshape(count, (ROWS, 256))


@triton.jit
def _stretched(count, byte):
    """Return the table of autocontrast, (ROWS, 256) int32, in the float64 of PIL's Python."""
    low = tl.min(tl.where(count > 0, byte, 256), 1, keep_dims=True)
    span = (tl.max(tl.where(count > 0, byte, -1), 1, keep_dims=True) - low).to(tl.float64)
    scale = 255.0 / tl.maximum(span, 1.0)
    value = byte.to(tl.float64) * scale + (-low).to(tl.float64) * scale
    value = tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)
    return tl.where(span > 0, value, byte)


@triton.jit
def _equalized(count, byte, PIXELS: tl.constexpr):
    """Return the table of equalize, (ROWS, 256) int32."""
    high = tl.max(tl.where(count > 0, byte, -1), 1, keep_dims=True)
    step = (PIXELS - tl.sum(tl.where(byte == high, count, 0), 1, keep_dims=True)) // 255
    before = tl.cumsum(count, 1) - count
    value = tl.minimum((step // 2 + before) // tl.maximum(step, 1), 255)
    return tl.where(step > 0, value, byte)


@triton.jit
def _table(
    image_ptr, frame, operation, strength, HEIGHT, WIDTH, CHANNELS, MODE, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """Return what becomes of each byte in each channel, (256 ROWS,) int32."""
    byte = tl.broadcast_to(tl.arange(0, 256)[None, :], (ROWS, 256))
    table = byte
    if operation == BRIGHTNESS:
        table = _blend(byte * 0, byte, strength)
    elif operation == CONTRAST:
        table = _blend(_mean(image_ptr, frame, HEIGHT, WIDTH, CHANNELS, MODE, BLOCK), byte, strength)
    elif (operation == AUTOCONTRAST) | (operation == EQUALIZE):
        count = _counts(image_ptr, frame, HEIGHT, WIDTH, CHANNELS, MODE, BLOCK, ROWS)
        if operation == AUTOCONTRAST:
            table = _stretched(count, byte)
        else:
            table = _equalized(count, byte, HEIGHT * WIDTH)
    return tl.reshape(table, (ROWS * 256,))


@triton.jit
def _recoloured(image_ptr, frame, y, x, channel, value, operation, strength, table, HEIGHT, WIDTH, CHANNELS, MODE):
    """Return what an operation on colours makes of the values at some places, int32."""
    if operation == COLOR:
        value = _blend(_grey(image_ptr, frame, y, x, HEIGHT, WIDTH, CHANNELS, MODE), value, strength)
    elif operation == SHARPNESS:
        smooth = _smooth(image_ptr, frame, y, x, channel, HEIGHT, WIDTH, CHANNELS, MODE)
        value = _blend(smooth, value, strength)
    elif operation <= EQUALIZE:
        value = tl.gather(table, channel * 256 + value, 0)
    return value


@triton.jit
def _frame(
    view,
    operation,
    HEIGHT,
    WIDTH,
    MIRROR: tl.constexpr,
    PADDING,
    MODE,
    MOST_CUT: tl.constexpr,
    TURNING: tl.constexpr,
    SHEAR_RANGE,
    TURNS,
):
    """Return how the image is seen, as `_pixel` reads it: mirrored, what is cut off, and turned."""
    flip = tl.where(view >= 0, below(word_of(view, FLIP), 2) if MIRROR else 0, 0)
    if MOST_CUT is None:
        shift_x, left, right = crop(view, FROM_X, WIDTH, PADDING, MODE)
        shift_y, top, bottom = crop(view, FROM_Y, HEIGHT, PADDING, MODE)
    else:
        cut = tl.where(view >= 0, below(word_of(view, CUT), MOST_CUT + 1), 0)
        cut_x = below(word_of(view, CUT_X), cut + 1)
        shift_x, left, right = shift(view, FROM_X, TO_X, WIDTH, cut_x)
        shift_y, top, bottom = shift(view, FROM_Y, TO_Y, HEIGHT, cut - cut_x)
    begin_x, begin_y, scale, x_by_y, y_by_x = flip, flip, flip, flip, flip
    if TURNING:
        wide, across, down = turn(view, operation, SHEAR_RANGE, TURNS)
        begin_x, begin_y = begin(wide, across, WIDTH, HEIGHT), begin(wide, down, HEIGHT, WIDTH)
        scale, x_by_y, y_by_x = fixed(wide, 16), fixed(across, 16), fixed(down, 16)
    return flip, shift_x, left, right, shift_y, top, bottom, begin_x, begin_y, scale, x_by_y, y_by_x


@triton.jit
def _blackened(value, y, x, first_y, first_x, height, width):
    """Return the values, but for 0 in a rectangle."""
    inside = (y >= first_y) & (y < first_y + height) & (x >= first_x) & (x < first_x + width)
    return tl.where(inside, 0, value)


@triton.jit
def _strong_augment_kernel(
    image_ptr,
    view_ptr,
    index_ptr,
    out_ptr,
    POLICY: tl.constexpr,
    MIRROR: tl.constexpr,
    PADDING: tl.constexpr,
    MODE: tl.constexpr,
    SQUARE: tl.constexpr,
    N,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    MOST_CUT: tl.constexpr,
    UNTIL: tl.constexpr,
    SHEAR_RANGE: tl.constexpr,
    TURNS: tl.constexpr,
    SHARE: tl.constexpr,
    RANGE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)  # int64: a batch may pass 2**31 values
    view, source = tl.load(view_ptr + sample), sample
    if index_ptr is not None:
        source = tl.minimum(tl.maximum(tl.load(index_ptr + sample), 0), N - 1)
    image_ptr += source * (HEIGHT * WIDTH * CHANNELS)
    out_ptr += sample * (HEIGHT * WIDTH * CHANNELS)
    turning: tl.constexpr = len(UNTIL) > 0
    mode: tl.constexpr = MODE if MOST_CUT is None else "zeros"

    operation, strength = 0, 0.0
    if turning:
        operation = operation_of(view, UNTIL)
        strength = strength_of(view, operation)
    frame = _frame(view, operation, HEIGHT, WIDTH, MIRROR, PADDING, MODE, MOST_CUT, turning, SHEAR_RANGE, TURNS)
    if turning:
        table = _table(image_ptr, frame, operation, strength, HEIGHT, WIDTH, CHANNELS, mode, BLOCK, ROWS)
    if SHARE > 0:
        erase_y, erase_x, erase_height, erase_width = erased(view, SHARE, RANGE, HEIGHT, WIDTH)
    if SQUARE > 0:
        cutout_y = tl.where(view >= 0, below(word_of(view, CUTOUT_Y), HEIGHT) - SQUARE // 2, HEIGHT)
        cutout_x = tl.where(view >= 0, below(word_of(view, CUTOUT_X), WIDTH) - SQUARE // 2, WIDTH)

    for start in range(0, HEIGHT * WIDTH * CHANNELS, BLOCK):
        y, x, channel = _places(start, WIDTH, CHANNELS, BLOCK)
        value = _pixel(image_ptr, frame, y, x, channel, HEIGHT, WIDTH, CHANNELS, mode, turning)
        if turning:
            value = _recoloured(
                image_ptr, frame, y, x, channel, value, operation, strength, table, HEIGHT, WIDTH, CHANNELS, mode
            )
        if SHARE > 0:
            value = _blackened(value, y, x, erase_y, erase_x, erase_height, erase_width)
        if SQUARE > 0:
            value = _blackened(value, y, x, cutout_y, cutout_x, SQUARE, SQUARE)
        pixel = value.to(tl.float32)
        pixel = tl.fma(pixel, WHOLE, pixel * REST)
        place = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + place, pixel.to(out_ptr.dtype.element_ty), mask=place < HEIGHT * WIDTH * CHANNELS)
