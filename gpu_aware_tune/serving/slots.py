"""Slots of a model's waiting rows: written once on arrival, read by the run where they lie.

Slots lie one behind the other, so that a batch of rows that arrived together is a view of them, not a
copy. A request has consecutive slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import numpy as np

ALIGNMENT = 64  # bytes: of TVM's tensors, which vector loads rely on


class SlotRing:
    """Memory for `size` rows of a model's inputs. Not thread-safe, but for `write` and `view`.

    Args:
        shapes: of one row of each input.
        dtypes: of each input, as NumPy takes them.
        size: the number of slots.
        in_order: use one slot after the other, so that rows which arrive together lie together;
            else the lowest that is free, so that memory is only touched for what waits at once.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[np.dtype],
        size: int,
        in_order: bool = True,
    ) -> None:
        self.size, self._in_order = size, in_order
        self._arrays = [
            _aligned((size, *shape), dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        self._used = bytearray(size)
        self._head = 0

    @property
    def free(self) -> int:
        """How many slots are free."""
        return self._used.count(0)

    def take(self, count: int) -> int | None:
        """Take consecutive slots, returns the first; None where there is no such gap."""
        gap = bytes(count)
        first = self._used.find(gap, self._head)
        if first < 0:
            first = self._used.find(gap)
        if first < 0:
            return None
        self._used[first : first + count] = b"\1" * count
        self._head = first + count if self._in_order else 0
        return first

    def give_back(self, first: int, count: int = 1) -> None:
        """Free slots again; with nothing waiting the next request is written where the cache is."""
        self._used[first : first + count] = bytes(count)
        if not any(self._used):
            self._head = 0

    def write(self, first: int, arrays: Sequence[np.ndarray], whole: bool) -> None:
        """Copy a request's inputs into its slots.

        Args:
            first: its first slot.
            arrays: one for each input.
            whole: each array is one row; else its leading axis counts the rows.
        """
        for slots, array in zip(self._arrays, arrays, strict=True):
            if whole:
                slots[first] = array
            else:
                slots[first : first + len(array)] = array

    def copy(self, first: int, other: SlotRing, from_first: int, count: int) -> None:
        """Copy rows from slots of another ring of the same shapes."""
        for own, others in zip(self._arrays, other._arrays, strict=True):
            own[first : first + count] = others[from_first : from_first + count]

    def rows(self, slots: Sequence[int], batch: int) -> list[np.ndarray]:
        """The inputs of a batch: views where the rows lie in order, else copies.

        Args:
            slots: of the rows.
            batch: the size of the batch; what is behind the rows is padding, which holds anything
                that the model was given before.
        """
        first, ordered = slots[0], all(b == a + 1 for a, b in pairwise(slots))
        if ordered and first + batch <= self.size:
            return [array[first : first + batch] for array in self._arrays]
        order = [*slots, *[slots[-1]] * (batch - len(slots))]
        return [array[order] for array in self._arrays]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros that begin at a multiple of the alignment."""
    size = prod(shape) * dtype.itemsize
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
