"""`manage.py playground`: make a handful of changes in the playground's database."""
from __future__ import annotations

from typing import Any

import psycopg
from django.core.management.base import BaseCommand, CommandError

from sequinapp import playground


class Command(BaseCommand):
    help = "Make a handful of changes in the playground's database, for people without psql."

    def handle(self, *_: Any, **options: Any) -> None:
        try:
            done = playground.make_changes()
        except playground.NoPlayground as error:
            raise CommandError(str(error)) from None
        except psycopg.OperationalError as error:
            raise CommandError(f"the playground does not answer: is `manage.py up` running? {' '.join(str(error).split())}") from None
        for line in done:
            self.stdout.write(line)
        self.stdout.write(f"They wait for {playground.PULL} (receive them with curl) and have been pushed to the receiver page.")
