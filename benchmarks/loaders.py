"""How many augmented images a second does each loader give: ours, FFCV by itself, torchvision?

    python benchmarks/loaders.py --json loaders.json        also --batch 128, --quick, --device cpu

A call is an epoch. `images/s` ends where the batch is float pixels on the device, cropped and mirrored. Ours draws the
views itself, so that an epoch can be drawn again and backends agree to the bit; the others draw their own, and are only
checked to give views of the right images. The first row is the baseline: a `ratio` above 1 is slower than it. What a
loader must give to keep up is the images/s of `benchmarks/step.py`.
"""

import sys

from retemper.engine.cli import main

if __name__ == "__main__":
    main(["bench", "loaders", *sys.argv[1:]])
