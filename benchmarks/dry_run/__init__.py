"""A dry run of the GPU code on a machine without a GPU: `python benchmarks/gpu_dry_run.py` is its command line."""
