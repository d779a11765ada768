#!/usr/bin/env python
"""Run a command of the service: `python manage.py up`, `python manage.py help`."""
from __future__ import annotations

import os
import sys


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "sequinapp.settings")
    from django.core.exceptions import ImproperlyConfigured
    from django.core.management import execute_from_command_line
    from django.db import InterfaceError, OperationalError, ProgrammingError

    try:
        execute_from_command_line(sys.argv)
    except ImproperlyConfigured as error:
        refuse(str(error), 2)
    except (OperationalError, InterfaceError) as error:
        where = "DATABASE_URL" if os.environ.get("DATABASE_URL") else "the embedded Postgres runs only while `manage.py up` does"
        refuse(f"the store does not answer ({where}): {error}", 1)
    except ProgrammingError as error:
        if "does not exist" not in str(error):
            raise
        refuse(f"the store is not migrated, run `manage.py migrate`: {error}", 1)


def refuse(reason: str, status: int) -> None:
    """One line for a person, not a traceback."""
    print(f"sequin: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
