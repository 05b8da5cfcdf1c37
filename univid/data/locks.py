"""One process at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".lock"


@contextmanager
def alone(name: str, folder: Path) -> Iterator[None]:
    """In ``folder``, which is made where it is not there: what one process has half written, another would remove or write into.

    The lock is the process's, not its workers'; whatever ends it gives the lock back.

    Raises:
        ValueError: another process has it; ``name`` is what the message calls the folder. OSError: it cannot be written.
    """
    path = folder / LOCK
    try:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        opened = path.open("w")
    except OSError as error:
        raise OSError(f"{name}: {folder} cannot be written: {error.strerror}") from None
    with opened as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{name}: another process writes to {folder}; another folder needed") from None
        except OSError:  # a disk that knows no locks
            pass
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if made:  # and nothing came of it
                with suppress(OSError):
                    folder.rmdir()
