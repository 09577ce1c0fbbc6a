"""Pieces made by threads, as many as cores, and put into the files wherever they belong."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Final

#: How long the caller waits for a piece before it looks for signals.
_POLL_S: Final = 0.2


def run_all(
    pieces: Sequence[int],
    work: Callable[[int], int],
    n_threads: int,
    on_done: Callable[[int, int], None],
) -> None:
    """Call ``work(piece)`` for all pieces on ``n_threads`` threads.

    Args:
        pieces: in the order in which they are begun.
        work: returns a number of bytes.
        n_threads: how many pieces are made at once.
        on_done: called with the piece and its bytes on the calling thread, in any order.

    Raises:
        whatever ``work`` raises first, after the pieces in work have ended; or what interrupts the
        calling thread.
    """
    pending = iter(pieces)
    lock, stop = threading.Lock(), threading.Event()
    done: queue.SimpleQueue[tuple[int, int] | BaseException | None] = queue.SimpleQueue()

    def loop() -> None:
        try:
            while not stop.is_set():
                with lock:
                    piece = next(pending, None)
                if piece is None:
                    break
                done.put((piece, work(piece)))
        except BaseException as error:  # handed to the caller, who raises it
            stop.set()
            done.put(error)
        finally:
            done.put(None)

    threads = [threading.Thread(target=loop, daemon=True) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    try:
        _collect(done, n_threads, on_done)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _collect(
    done: queue.SimpleQueue[tuple[int, int] | BaseException | None],
    n_running: int,
    on_done: Callable[[int, int], None],
) -> None:
    failure: BaseException | None = None
    while n_running:
        try:
            item = done.get(timeout=_POLL_S)
        except queue.Empty:
            continue
        if item is None:
            n_running -= 1
        elif isinstance(item, BaseException):
            failure = failure or item
        else:
            on_done(*item)
    if failure is not None:
        raise failure
