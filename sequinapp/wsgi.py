"""The WSGI application that granian serves."""
import os
from collections.abc import Callable, Iterable
from typing import Any

from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "sequinapp.settings")

FITS_IN_FLIGHT = 65_536  # bytes of a body that are sent without the server reading them
DRAINED_BYTES = 32 * 1024 * 1024  # of a body that nobody wanted; whoever sends more is cut off

_django = get_wsgi_application()

from delivery.pull.shortcut import PullShortcut  # noqa: E402  (needs the apps, which are loaded by now)

_answer = PullShortcut(_django)


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """The answer, once the request has been taken in.

    Most clients look for no answer before they have sent all. One that is refused early, for its size or its token, would
    see a broken connection and not why.
    """
    answer = _answer(environ, start_response)
    if int(environ.get("CONTENT_LENGTH") or 0) > FITS_IN_FLIGHT or "HTTP_TRANSFER_ENCODING" in environ:
        left = DRAINED_BYTES
        while left > 0 and (piece := environ["wsgi.input"].read(min(left, FITS_IN_FLIGHT))):
            left -= len(piece)
    return answer


if served := os.environ.get("SEQUIN_WEB_BEATS"):
    from sequinapp.management.commands.run_web import beat_while_serving

    beat_while_serving(served)
