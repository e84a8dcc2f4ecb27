"""Reading cubins: the machine code in them, without the rest that differs between ways to compile."""

from __future__ import annotations

import struct


def machine_code(cubin: bytes) -> dict[str, bytes]:
    """Return the instructions of each kernel in a cubin, by section of the ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    found = {}
    for name, _kind, _flags, _address, offset, length in headers:
        start = headers[names][4] + name
        label = cubin[start : cubin.index(b"\0", start)].decode()
        if label.startswith(".text"):
            found[label] = cubin[offset : offset + length]
    return found
