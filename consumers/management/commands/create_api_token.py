"""`manage.py create_api_token NAME`: make an API token and print it, once."""
from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError

from consumers import audit
from consumers.models import ApiToken, Consumer
from consumers.tokens import create_token


class Command(BaseCommand):
    help = "Make an API token. It is printed alone on the last line, once; only its hash is kept."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("name")
        parser.add_argument("--scope", default="pull", choices=ApiToken.SCOPES)
        parser.add_argument("--consumer", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
        parser.add_argument("--rate-limit", type=int, metavar="N", help="requests a second; no limit without it")

    def handle(self, *_: Any, **options: Any) -> None:
        audit.acting_as("command create_api_token")
        chosen = []
        for name in options["consumer"]:
            found = Consumer.objects.filter(name=name).first()
            if found is None:
                known = ", ".join(Consumer.objects.values_list("name", flat=True)[:20]) or "none yet"
                raise CommandError(f"there is no consumer {name!r}; there is: {known}")
            chosen.append(found)
        try:
            plain = create_token(options["name"], options["scope"], chosen, options["rate_limit"])[1]
        except ValidationError as error:
            raise CommandError("; ".join(f"{field}: {' '.join(text)}" for field, text in error.message_dict.items())) from None
        self.stdout.write(plain)
