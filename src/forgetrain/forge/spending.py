"""Counting an attempt's seconds while somebody else works on it: an agent may take an hour, and a kill gives no second
of it back.

    with spending(ledger, attempt, began):
        answer = proposer.propose(brief)
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

from forgetrain.errors import UserError
from forgetrain.judge.ledger import Ledger

#: Seconds between two entries: what a kill may leave uncounted.
EVERY = 1.0


@contextmanager
def spending(ledger: Ledger, attempt: str, began: float) -> Iterator[None]:
    """``began``: when the attempt did, by ``time.monotonic``."""
    answered = Event()

    def count() -> None:
        while not answered.wait(EVERY):
            # a connection belongs to the thread that opened it; what ails the file, the loop's next call will say
            with suppress(UserError, OSError), Ledger(ledger.path.parent, create=False) as own:
                own.spend(attempt, seconds=time.monotonic() - began)

    counting = Thread(target=count, daemon=True)
    counting.start()
    try:
        yield
    except BaseException:  # an answer, the caller enters itself, with what else it cost
        ledger.spend(attempt, seconds=time.monotonic() - began)
        raise
    finally:
        answered.set()
        counting.join()
