"""Workers that stop themselves, as SIGSTOP would, at one step of a backfill.

`python -m tests.capture.stopping_worker` reads lines `STEP COUNT`, starts a worker for each and answers its pid. Let go on by
SIGCONT, a worker finishes its turn and ends.
"""
from __future__ import annotations

import os
import signal
import sys
from typing import Any

STEPS = [
    "take_turn", "history", "place", "set_parts", "last_id", "look", "_snapshot", "_copied", "_end", "_high", "seen", "begin_from",
    "register_relation", "stage", "append", "_append", "keep_turn", "yield_turn", "drop_staged",
]  # fmt: skip


def main() -> None:
    import django

    django.setup()
    import capture.backfilling  # noqa: F401  (once for all)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        name, nth = line.split()
        pid = os.fork()
        if pid == 0:
            work(name, int(nth))
            os._exit(0)
        print(pid, flush=True)  # noqa: T201


def work(name: str, nth: int) -> None:
    from capture import backfilling
    from capture.pages import SourcePages
    from consumers.store.backfill_work import BackfillWork

    left = [nth]

    def stop() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGSTOP)

    for owner in (BackfillWork, SourcePages):
        before = owner.__dict__.get(name)
        if before is None:
            continue

        def method(self: Any, *given: Any, _before: Any = before, **named: Any) -> Any:
            stop()
            result = _before(self, *given, **named)
            if name == "_copied":
                return rows(result)
            stop()
            return result

        setattr(owner, name, method)

    def rows(found: Any) -> Any:
        for number, row in enumerate(found):
            if number == 5:
                stop()
            yield row

    backfilling.FEWEST_ROWS = backfilling.MOST_ROWS = 10
    backfilling.KEEP_TURN_EVERY_S = 0.0
    for _ in range(3):
        backfilling.step(slice_s=0.5)


if __name__ == "__main__":
    main()
