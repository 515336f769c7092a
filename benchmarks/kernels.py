"""What does a fused kernel save over the PyTorch that it stands for?

    python benchmarks/kernels.py --json kernels.json        also --only pgd_step_, --batch 128, --quick, --device cpu
    python benchmarks/kernels.py --sweep                    which block sizes are best on this GPU

One table a kernel, size and precision. `ratio` is a row's time in ours: above 1 ours is faster, round by round, with
its 10th and 90th percentile. `of bound` is what a copy of as many bytes would take, on this machine in this run: 90% is
the aim for `pgd_step_` and `augment`, 80% for the KL, at the large sizes. Small ones fit in a cache and may pass 100%;
and where `host ms` is no less than `ms`, Python's launches are what was measured, and `kernels ms` is the kernel alone.
Without a GPU ours is plain PyTorch, and the table says nothing about the kernels.
"""

import sys

from retemper.engine.cli import main

if __name__ == "__main__":
    main(["bench", "kernels", *sys.argv[1:]])
