"""What every console page has in common."""
from __future__ import annotations

from typing import Any

from django.http import HttpRequest


def context(request: HttpRequest) -> dict[str, Any]:
    """unfold's global callback. Colours stand in console.css: a style element in the page would not be let in."""
    return {"colors": {}}
