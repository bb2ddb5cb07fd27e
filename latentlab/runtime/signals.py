"""Signal handlers that are in place for as long as a context is open."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def on_signals(handler: Callable, names: Sequence[str] = ("SIGINT", "SIGTERM")) -> Iterator[None]:
    """Call `handler(number, frame)` on these signals; the former handlers come back at the end.

    Signals that the system lacks are left out; outside the main thread, where Python allows no
    handlers, nothing is changed.
    """
    main = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in names if main and hasattr(signal, name)]
    former = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in former.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)
