"""Compressed files read as a stream of plain bytes."""

import gzip
import io
import zlib
from typing import Any, BinaryIO, cast


class _ZstdBroken(Exception):
    pass


BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, _ZstdBroken)


def decompressed(raw: BinaryIO) -> io.BufferedIOBase:
    """What an open file holds, by its name's suffix: .gz, .zst or plain.

    Reading from it raises one of `BROKEN` where the compressed data is damaged or cut off.
    """
    if raw.name.endswith(".gz"):
        return cast(io.BufferedIOBase, gzip.GzipFile(fileobj=raw))
    if raw.name.endswith(".zst"):
        return io.BufferedReader(_ZstdStream(raw), 1 << 20)
    return cast(io.BufferedIOBase, raw)


class _ZstdStream(io.RawIOBase):
    """Frames of a .zst file, one after the other. Unlike zstandard's own stream reader it fails
    when the last frame has no end."""

    def __init__(self, raw: BinaryIO):
        import zstandard

        self._raw, self._zstandard = raw, zstandard
        self._frame: Any = None
        self._compressed = self._plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            chunk = self._compressed or self._raw.read(1 << 14)
            if not chunk:
                if self._frame is not None:
                    raise _ZstdBroken("the last frame has no end")
                return 0
            self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._plain = self._frame.decompress(chunk)
            except self._zstandard.ZstdError as error:
                raise _ZstdBroken(str(error)) from error
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._plain))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count
