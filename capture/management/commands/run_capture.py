"""`manage.py run_capture`: read the WAL of the active sources into the log."""
from __future__ import annotations

import os
from argparse import SUPPRESS, ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from capture.reading import Reading
from capture.readers import Readers
from consumers.models import Source


class Command(BaseCommand):
    help = "Read the WAL of one, several or all active sources. Safe to run twice: one reads a source, others stand by."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--source", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
        parser.add_argument("--reader", metavar="ID", help=SUPPRESS)

    def handle(self, *_: Any, **options: Any) -> None:
        if options["reader"]:
            if os.getppid() == 1:
                return  # the watcher had gone before the kernel knew that this one goes with it
            source = Source.objects.filter(pk=options["reader"]).first()
            if source is not None:
                Reading(source).run()
            return
        names = options["source"]
        known = set(Source.objects.filter(name__in=names).values_list("name", flat=True))
        for name in names:
            if name not in known:
                have = ", ".join(Source.objects.values_list("name", flat=True)) or "none yet"
                raise CommandError(f"there is no source {name!r}; there is: {have}")
        Readers(names).run()
