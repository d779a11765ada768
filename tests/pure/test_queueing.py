"""Waiting in the order of coming, with real threads."""
from __future__ import annotations

import threading
from collections.abc import Callable

from consumers.queueing import FairSemaphore, FewAtOnce
from tests.conftest import wait_until


def started(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_who_came_first_is_served_first() -> None:
    semaphore = FairSemaphore(2)
    served: list[int] = []
    assert semaphore.acquire() and semaphore.acquire()
    threads = []
    for number in range(5):
        threads.append(started(lambda number=number: served.append(number) if semaphore.acquire() else None))
        wait_until(lambda number=number: len(semaphore._waiting) == number + 1)
    for count in range(1, 6):
        semaphore.release()
        wait_until(lambda count=count: len(served) == count)
        assert not semaphore.acquire(0)  # one that comes now does not get ahead
    assert served == list(range(5))


def test_who_no_longer_waits_is_passed_over() -> None:
    semaphore = FairSemaphore(1)
    assert semaphore.acquire()
    assert not semaphore.acquire(0.01) and not semaphore._waiting
    semaphore.release()
    assert semaphore.acquire(0)
    assert not semaphore.acquire(0)


def test_no_more_than_so_many_are_in() -> None:
    semaphore, inside, most, lock = FairSemaphore(3), [0], [0], threading.Lock()

    def work() -> None:
        for number in range(300):
            if number % 3 == 0:
                if not semaphore.acquire(0.0001):
                    continue
            else:
                semaphore.acquire()
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            with lock:
                inside[0] -= 1
            semaphore.release()

    threads = [started(work) for _ in range(12)]
    for thread in threads:
        thread.join(120)
    assert most[0] <= 3 and semaphore._free == 3 and not semaphore._waiting


def test_one_key_waits_and_another_does_not() -> None:
    gates, order = FewAtOnce(1), []
    with gates.at("a"):
        waiting = started(lambda: _enter(gates, "a", order))
        started(lambda: _enter(gates, "b", order)).join(60)
        wait_until(lambda: gates._gates["a"].users == 2)
        assert order == ["b"]
    waiting.join(60)
    assert order == ["b", "a"] and not gates._gates


def _enter(gates: FewAtOnce, key: str, order: list[str]) -> None:
    with gates.at(key):
        order.append(key)
