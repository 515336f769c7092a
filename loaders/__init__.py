"""Data sets from the disk to the device: uint8 batches, the same bits from either backend."""

from retemper.errors import DataError, UsageError
from retemper.loaders.beton import beton_split, convert, verify
from retemper.loaders.choose import LoaderKind, make_loader
from retemper.loaders.datasets import DATASETS, load_split, usual_eps
from retemper.loaders.ffcv_library import ffcv_problem
from retemper.loaders.loader import Batch, Loader
from retemper.loaders.long_tail import long_tail
from retemper.loaders.mixed import Extra
from retemper.loaders.pool import Pool, open_pool
from retemper.loaders.split import Split, middle, split_of_arrays
from retemper.loaders.views import ViewSpace, epoch_order, holdout_split

__all__ = [
    "DATASETS",
    "Batch",
    "DataError",
    "Extra",
    "Loader",
    "LoaderKind",
    "Pool",
    "Split",
    "UsageError",
    "ViewSpace",
    "beton_split",
    "convert",
    "epoch_order",
    "ffcv_problem",
    "holdout_split",
    "load_split",
    "long_tail",
    "make_loader",
    "middle",
    "open_pool",
    "split_of_arrays",
    "usual_eps",
    "verify",
]
