"""Streams of plain bytes from compressed files."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from typing import Any, BinaryIO, cast

from megatron_ext.errors import UserError

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
# The largest window that zstd writes (--ultra --long=31). Memory is allocated for the window that a
# frame declares.
_LARGEST_WINDOW = 1 << 31
_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, with whose mark it begins
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class _ZstdBroken(Exception):
    pass


BROKEN = (EOFError, OSError, zlib.error, lzma.LZMAError, _ZstdBroken)


def is_compressed(path: str) -> bool:
    """Return whether a file's suffix, in any case, is one of `COMPRESSIONS`."""
    return path.lower().endswith(COMPRESSIONS)


def decompressed(raw: BinaryIO) -> io.BufferedIOBase:
    """Return the plain bytes of an open file, compressed as its suffix says.

    Reading begins after a byte order mark of UTF-8. It raises one of `BROKEN` if the compressed
    data is damaged or truncated.

    Args:
        raw: The file; its name ends with one of `COMPRESSIONS`, or it is not compressed.

    Raises:
        UserError: The byte order mark is that of another encoding than UTF-8.
    """
    stream = _plain_stream(raw)
    beginning = stream.peek(4)[:4]
    for mark, encoding in _OTHER_ENCODINGS.items():
        if beginning.startswith(mark):
            raise UserError(f"{raw.name} is {encoding} text. Convert it to UTF-8.")
    if beginning.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
    return cast(io.BufferedIOBase, stream)


def _plain_stream(raw: BinaryIO) -> Any:
    name = raw.name.lower()
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if name.endswith(".bz2"):
        return bz2.BZ2File(raw)
    if name.endswith(".xz"):
        return lzma.LZMAFile(raw)
    if name.endswith(".zst"):
        return io.BufferedReader(_ZstdStream(raw), 1 << 20)
    return raw


class _ZstdStream(io.RawIOBase):
    """Concatenated frames of a .zst file.

    Unlike zstandard's own stream reader, it raises an error if the last frame is incomplete.
    """

    def __init__(self, raw: BinaryIO):
        import zstandard

        self._raw, self._error = raw, zstandard.ZstdError
        decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._new_frame = decompressor.decompressobj
        self._frame: Any = None
        self._compressed = self._plain = b""

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read plain bytes into a buffer; see `io.RawIOBase`."""
        while not self._plain:
            chunk = self._compressed or self._raw.read(1 << 14)
            if not chunk:
                if self._frame is not None:
                    raise _ZstdBroken("the last frame is incomplete")
                return 0
            self._frame = self._frame or self._new_frame()
            try:
                self._plain = self._frame.decompress(chunk)
            except self._error as error:
                raise _ZstdBroken(str(error)) from error
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._plain))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count
