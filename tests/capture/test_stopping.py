"""The signal that tells a reader to stop may come at any moment of its waiting."""
from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT, process_environment

PROGRAM = """
import faulthandler, random, signal, time
import django
django.setup()
from capture.reading import Reading
from consumers.models import Source
end = time.monotonic() + 15
for number in range(20_000):
    if number % 500 == 0:
        if time.monotonic() > end:
            break
        faulthandler.dump_traceback_later(60, exit=True)
    reading = Reading(Source())
    signal.signal(signal.SIGALRM, reading.stop)
    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 1e-4))
    while not reading.stopping:
        reading._wait(0.00005)
print("all heard")
"""


def test_whenever_a_signal_comes_it_is_heard() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=process_environment(), capture_output=True, text=True, timeout=200)
    assert done.stdout == "all heard\n", done.stderr
