"""A limit of memory that threads share."""

import contextlib
import threading
from collections.abc import Iterator


class ByteBudget:
    """So many bytes that threads may hold together; one that wants more than all of them has them alone.

    Args:
        num_bytes: of all together.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.held = 0
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """Hold so many bytes while entered; wait until others have given back enough. A thread holds once."""
        with self.changed:
            self.changed.wait_for(lambda: self.held == 0 or self.held + num_bytes <= self.num_bytes)
            self.held += num_bytes
        try:
            yield
        finally:
            with self.changed:
                self.held -= num_bytes
                self.changed.notify_all()
