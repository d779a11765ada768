#!/usr/bin/env python
"""Run a command of the service: `python manage.py up`, `python manage.py help`."""
from __future__ import annotations

import os
import sys


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "sequinapp.settings")
    from django.core.exceptions import ImproperlyConfigured
    from django.core.management import execute_from_command_line

    try:
        execute_from_command_line(sys.argv)
    except ImproperlyConfigured as error:
        sys.exit(_refuse(str(error)))


def _refuse(reason: str) -> int:
    print(f"sequin: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
