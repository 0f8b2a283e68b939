"""How many threads torch computes with, for as long as one call takes."""

import contextlib
import threading
from collections.abc import Iterator

import torch

__all__ = ["torch_threads"]

_lock = threading.Lock()
_counts: list[int] = []  # of the calls that are in the block now, in any thread
_outside = 0  # the count when the first of them came
_depth = threading.local()


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """While the block runs, torch computes with so many threads in this thread; then with as many as before.

    Torch keeps a count for each thread, and one for the process, with which a thread begins that it has not seen yet.
    One that comes in with the count of another that is inside has most likely begun with it, and gets what was there
    before. What cannot be helped: a thread that meets torch for the first time, outside of any block, while another is
    inside, begins with the other's count.
    It costs 5 µs, and nothing where `threads` is None, which leaves torch as it is.
    """
    global _outside
    if threads is None:
        yield
        return
    depth = getattr(_depth, "value", 0)
    with _lock:
        before = torch.get_num_threads()
        if not _counts:
            _outside = before
        elif depth == 0 and before in _counts:
            before = _outside
        _counts.append(threads)
        _set(threads)
    _depth.value = depth + 1
    try:
        yield
    finally:
        _depth.value = depth
        with _lock:
            _counts.remove(threads)
            _set(before)


def _set(threads: int) -> None:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
