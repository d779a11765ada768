"""`manage.py run_workers`: the django-q2 clusters that push and replay, watched from outside."""
from __future__ import annotations

import os
import signal
from argparse import SUPPRESS, ArgumentParser
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand
from django.db import connections

from consumers.parent import die_with_parent
from delivery.cluster import REPLAY_CLUSTER, Watcher

REPLAY_NICENESS = 10  # what is replayed can wait; what is new cannot


class Command(BaseCommand):
    help = "Run the django-q2 clusters that push and backfill. Any number, on any number of machines."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--cluster", action="store_true", help=SUPPRESS)

    def handle(self, *_: Any, **options: Any) -> None:
        if not options["cluster"]:
            Watcher(settings.SEQUIN_WORKERS).run()
            return
        if os.getppid() == 1:
            return  # the watcher had gone before the kernel knew that this one goes with it
        if os.environ.get("Q_CLUSTER_NAME") == REPLAY_CLUSTER:
            os.nice(REPLAY_NICENESS)
        # The cluster's processes are forks of one another: each ends with the one above it.
        os.register_at_fork(after_in_child=lambda: die_with_parent(signal.SIGKILL))
        from django_q.cluster import Cluster

        connections.close_all()
        cluster = Cluster()
        cluster.start()
        cluster.sentinel.join()
