"""Files that appear whole or not at all, on a local disk or wherever else `pyarrow.fs` reaches (`s3://...`)."""

import contextlib
import errno
import hashlib
import os
from pathlib import Path
from uuid import uuid4

from pyarrow import fs

MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}
"""What a disk says that is full, protected, broken or gone: whoever writes has done nothing wrong."""


def filesystem(path: str | os.PathLike) -> tuple[fs.FileSystem, str]:
    """The file system of a plain path or a URI, and the (absolute) path in it."""
    text = os.fspath(path)
    if "://" in text:
        return fs.FileSystem.from_uri(text)
    return fs.LocalFileSystem(), str(Path(text).expanduser().absolute())


def save(path: str | os.PathLike, content: bytes) -> None:
    """Write a whole file or nothing: beside its place, then renamed.  Missing folders are made."""
    system, place = filesystem(path)
    system.create_dir(os.path.dirname(place), recursive=True)
    put(system, place, content)


def read(path: str | os.PathLike) -> bytes:
    """A whole file.  Raises OSError where there is none."""
    system, place = filesystem(path)
    with system.open_input_stream(place) as stream:
        return stream.read()


def checksum(body: bytes) -> str:
    """By which a stored file is known to be whole: 40 hex digits."""
    return hashlib.blake2b(body, digest_size=20).hexdigest()


def put(system: fs.FileSystem, place: str, content: bytes) -> None:
    """`save` where the file system is known and the folder is there."""
    beside, local = f"{place}.{uuid4().hex}.part", isinstance(system, fs.LocalFileSystem)
    try:
        with system.open_output_stream(beside) as stream:
            stream.write(content)
        if local:
            written(beside)  # else a power cut could leave the new name with nothing behind it
        system.move(beside, place)
    except BaseException:
        if system.get_file_info(beside).type == fs.FileType.File:
            system.delete_file(beside)
        raise
    if local:
        with contextlib.suppress(OSError):  # some network file systems cannot; the file is whole all the same
            written(os.path.dirname(place))


def written(place: str) -> None:
    """Waits until the disk has a file, or the names in a folder."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
