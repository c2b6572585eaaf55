"""Strict npy headers: the three stored dtypes and int32 labels, nothing else; no Python literal is evaluated."""

import io
import re

import numpy as np

from trainer.errors import DataError

SHORTEST_HEADER = 64  # bytes; magic, length and dictionary need a few more
_MAGIC = b"\x93NUMPY"
# numpy writes exactly this form; a regular expression cannot allocate or recurse on hostile bytes.
_HEADER = re.compile(
    rb"\{'descr': '([<|=]?[a-z][0-9]{1,2})', 'fortran_order': (False|True), 'shape': \(([0-9, ]{0,60})\), ?\} *\n\Z"
)


def encode(array: np.ndarray) -> bytes:
    """The npy file of an array, header padded to 64 bytes."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def view(payload: np.ndarray, where: str) -> np.ndarray:
    """The array inside an npy file without a copy.

    payload: uint8 [bytes] (a memory map, say). Returns a view of 0 to 8 dimensions. Raises DataError naming `where`
    when the header is damaged, pickled, in Fortran order, or does not account for every byte of the payload.
    """
    head = payload[:12].tobytes()
    if len(head) < 12 or head[:6] != _MAGIC or head[6:8] not in (b"\x01\x00", b"\x02\x00"):
        raise DataError(f"{where}: not an npy file")
    size_bytes = 2 if head[6] == 1 else 4
    start = 8 + size_bytes + int.from_bytes(head[8 : 8 + size_bytes], "little")
    if start > len(payload) or start > 4096 or start % 16:
        raise DataError(f"{where}: npy header is damaged (length)")
    match = _HEADER.match(payload[8 + size_bytes : start].tobytes())
    if match is None:
        raise DataError(f"{where}: npy header is damaged or of an object dtype")
    descr, fortran, shape_text = match.groups()
    try:
        dtype = np.dtype(descr.decode())
        shape = tuple(int(part) for part in shape_text.replace(b" ", b"").split(b",") if part)
    except (TypeError, ValueError):
        raise DataError(f"{where}: npy header is damaged") from None
    if dtype.kind not in "fiu" or fortran == b"True" or len(shape) > 8:
        raise DataError(f"{where}: npy of dtype {descr.decode()} is not plain row-major numbers")
    if max(shape, default=0) > len(payload):  # also of an empty array, whose other extents no byte vouches for
        raise DataError(f"{where}: npy header says {shape}, payload has {len(payload) - start} bytes")
    count = 1
    for extent in shape:
        count *= extent  # Python integers: no overflow to hide behind
    if start + count * dtype.itemsize != len(payload):
        raise DataError(f"{where}: npy header says {shape} of {dtype}, payload has {len(payload) - start} bytes")
    return payload[start:].view(dtype).reshape(shape)
