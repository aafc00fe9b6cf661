"""Starting processes that do not run the caller's script again, and that end with it."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_main_module() -> Iterator[None]:
    """Start processes that do not run the caller's script again.

    A spawned process imports the main module, so that a script without ``if __name__ == "__main__"`` would call itself
    in every worker; these workers need nothing of it.
    """
    main = sys.modules["__main__"]
    spec, file = main.__spec__, getattr(main, "__file__", None)
    main.__spec__ = None
    if file is not None:
        del main.__file__
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def prepare_worker() -> None:
    """Prepare a new worker process: its parent handles interruptions, and it ends when its parent ends."""

    def end_with_parent() -> None:
        # Without this, the workers of a pool outlive a parent that was killed.
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
