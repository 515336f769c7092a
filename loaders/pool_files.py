"""The files of a pool of extra images: which they are, and the arrays in them, read in place or unpacked once.

A .npz is a zip of .npy files. Where numpy.savez wrote it, an array lies in it byte for byte and is read in place; what
numpy.savez_compressed wrote is unpacked into a .npy in the cache, a block at a time. The zip's directory has a checksum
of each array: equal checksums and sizes are taken for equal arrays, wherever the file lies.
"""

import glob
import math
import re
import shutil
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retemper.console import Progress
from retemper.errors import DataError
from retemper.files import BLOCK, DAMAGED, atomic_write, locked

LAYOUT = "a pool is a .npz with image (N, H, W, C) uint8 and label (N,)"
NUMBER = re.compile(r"(\d+)")
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip's entry: the lengths of its name and of what follows that


@dataclass(frozen=True)
class Member:
    """An array in a .npz.

    info: its entry in the zip's directory.
    header: bytes of the .npy before its values.
    """

    path: Path
    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype
    header: int

    @property
    def name(self) -> str:
        """Return its name, as numpy.load has it."""
        return self.info.filename.removesuffix(".npy")

    def values(self) -> Iterator[np.ndarray]:
        """Yield the values in one dimension, a block at a time; the zip's checksum is held to them at the end.

        Raises:
            DataError: the file is damaged.
        """
        size = BLOCK // self.dtype.itemsize * self.dtype.itemsize
        with _reading(self.path), zipfile.ZipFile(self.path) as file, file.open(self.info) as stream:
            stream.read(self.header)
            while block := stream.read(size):
                yield np.frombuffer(block, self.dtype)

    def place(self, cache: Path) -> tuple[Path, int]:
        """Return the file in which the values lie as they are, and where they begin there.

        Args:
            cache: the folder where a compressed array is unpacked, unless it is there already.
        Raises:
            DataError: the file is damaged, or there is no room.
        """
        if self.info.compress_type == zipfile.ZIP_STORED:
            with _reading(self.path), self.path.open("rb") as file:
                file.seek(self.info.header_offset)
                start = self.info.header_offset + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(file.read(30)))
                if start + self.info.file_size > self.path.stat().st_size:
                    raise ValueError("it is cut short")
            return self.path, start + self.header
        out = cache / "pools" / f"{self.info.CRC:08x}-{self.info.file_size}.npy"
        try:
            with locked(out.with_suffix(".lock")):  # several processes may begin at once
                if not out.exists() or out.stat().st_size != self.info.file_size:
                    self._unpack(out)
        except OSError as error:
            raise DataError(
                f"cannot unpack {self.path} into {out.parent} ({error.strerror or error}): name another --cache, or "
                "write it again with numpy.savez, which does not compress"
            ) from None
        return out, self.header

    def _unpack(self, out: Path) -> None:
        """Write the array as a .npy; whole or not at all. Raises OSError, or DataError where it is damaged."""
        size = self.info.file_size
        if shutil.disk_usage(out.parent).free < 1.02 * size:
            raise OSError(f"the disk has no room for {size / 2**30:.1f} GiB")
        what = f"unpacking {self.path.name} (MiB)"
        with (
            Progress(what, size >> 20) as shown,
            atomic_write(out) as file,
            zipfile.ZipFile(self.path) as packed,
            packed.open(self.info) as stream,
        ):
            while block := self._block(stream):
                file.write(block)
                shown.advance(len(block) >> 20)

    def _block(self, stream: Any) -> bytes:
        with _reading(self.path):
            return stream.read(BLOCK)


def members(path: Path) -> dict[str, Member]:
    """Return the arrays of a .npz by name.

    Raises:
        DataError: it is damaged, or holds Python objects, which are never unpickled.
    """
    with _reading(path), zipfile.ZipFile(path) as file:
        found = [_member(path, file, info) for info in file.infolist() if info.filename.endswith(".npy")]
    for one in found:
        if one.dtype.hasobject:
            raise DataError(f"{path}: {one.name} is a pickle of Python objects and was not run: write plain numbers")
    return {one.name: one for one in found}


def _member(path: Path, file: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    with file.open(info) as stream:
        shape, fortran, dtype = HEADERS[np.lib.format.read_magic(stream)](stream)
        header = stream.tell()
    if not dtype.hasobject:
        if header + math.prod(shape) * dtype.itemsize != info.file_size:
            raise ValueError(f"{info.filename} holds other than the {shape} numbers that it says")
        if fortran and len(shape) > 1:
            raise ValueError(f"{info.filename} is in Fortran's order: write numpy.ascontiguousarray of it")
    return Member(path, info, shape, dtype, header)


def pool_files(path: Path) -> list[Path]:
    """Return the files of a pool, by number.

    Args:
        path: a file; a folder, all of whose .npz are the numbered parts of one pool; or a pattern of their names.
    Raises:
        DataError: there is none, or a part is missing.
    """
    if path.is_file():
        return [path]
    found = path.glob("[!.]*.npz") if path.is_dir() else map(Path, glob.glob(str(path)))
    files = sorted(one for one in found if one.is_file())
    if not files:
        where = "holds no .npz" if path.is_dir() else "does not exist"
        raise DataError(f"--extra {path} {where}: {LAYOUT}, one file, or a folder or 'pattern*.npz' of numbered parts")
    return files if len(files) == 1 else _in_order(path, files)


def _in_order(path: Path, files: list[Path]) -> list[Path]:
    """Return numbered parts by number; their names differ in it alone. Raises DataError where one is missing."""
    split = [NUMBER.split(str(file)) for file in files]  # every second piece is a number
    differing = {at for one in split for at in range(len(one)) if one[at : at + 1] != split[0][at : at + 1]}
    if len(differing) != 1 or len({len(one) for one in split}) > 1 or not min(differing) % 2:
        names = f"{files[0].name} and {files[-1].name}"
        raise DataError(f"--extra {path}: {names} are no parts of one pool, by their names: name one file or a pattern")
    (at,) = differing
    numbers = [int(one[at]) for one in split]
    ordered = [file for _, file in sorted(zip(numbers, files, strict=True))]
    last = max(numbers)
    if re.fullmatch(r"[-_ ]?of[-_ ]?", split[0][at + 1]) and at + 2 < len(split[0]):  # part-00000-of-00004
        last = max(last, int(split[0][at + 2]) - (min(numbers) == 0))
    missing = sorted({*range(min(1, min(numbers)), last + 1)} - {*numbers})
    if missing or len({*numbers}) < len(numbers):
        told = f"part {missing[0]} is missing" if missing else "two parts have one number"
        raise DataError(f"--extra {path}: {told} beside {ordered[0].name}: fetch it, or name the files that there are")
    return ordered


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what readers of a damaged zip raise into one line."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except DAMAGED as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise DataError(f"{path} is cut short, or no .npz ({why}): fetch it again; {LAYOUT}") from None
