"""How long does PGD take here, in a loop anyone would write, in torchattacks and in foolbox, for the same strength?

    python benchmarks/attack.py --json attack.json          also --only resnet18, --batch 128, --quick, --device cpu

One table a network, objective (`ce`: cross-entropy; `kl`: that of distillation), number of steps and precision. A row
has a time only if its examples lie in the ball and in the range of pixels and reach a loss within 0.1% of the plain
loop's. `ratio` is a row's time in ours: above 1 ours is faster. `of bound` is the time that the convolutions and
products alone would take at this machine's matrix rate.
"""

import sys

from retemper.engine.cli import main

if __name__ == "__main__":
    main(["bench", "attack", *sys.argv[1:]])
