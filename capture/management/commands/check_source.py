"""`manage.py check_source NAME`: look at a source before it is used; each finding with the SQL that mends it."""
from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from consumers.models import Source
from consumers.source_connection import SourceUnreachable
from consumers.preflight import check


class Command(BaseCommand):
    help = "Pre-flight of a source: one line a finding. Exit status 1 when one blocks capture."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("name")

    def handle(self, *_: Any, **options: Any) -> None:
        source = Source.objects.filter(name=options["name"]).first()
        if source is None:
            have = ", ".join(Source.objects.values_list("name", flat=True)) or "none yet"
            raise CommandError(f"there is no source {options['name']!r}; there is: {have}")
        try:
            findings = check(source)
        except SourceUnreachable as error:
            raise CommandError(str(error)) from None
        for finding in findings:
            mark = "ok" if finding.ok else ("BLOCKS" if finding.blocking else "warning")
            self.stdout.write(f"{mark:8}{finding.text}" + (f"  -- {finding.sql}" if finding.sql else ""))
        if any(not finding.ok and finding.blocking for finding in findings):
            raise SystemExit(1)
