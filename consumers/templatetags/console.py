"""The words of `consumers.words` for templates."""
from __future__ import annotations

from datetime import datetime
from typing import Any

from django import template
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString

from consumers import words

register = template.Library()
register.filter("duration", words.duration)
register.filter("moment", words.moment)
register.filter("number", words.number)
register.filter("rate", words.rate)
register.filter("bytes", words.readable_bytes)


@register.filter
def ago(at: Any) -> str:
    """How long ago; of what is missing a dash."""
    return words.age(at, timezone.now()) if isinstance(at, datetime) else "–"


@register.simple_tag
def pill(state: str, text: str = "") -> SafeString:
    """A state in colour and words."""
    tone = words.tone_of(state)
    return format_html('<span class="sq-pill sq-{}">{}</span>', tone.colour, text or tone.word)


@register.inclusion_tag("console/chart.html")
def chart(drawn: Any, title: str) -> dict[str, Any]:
    return {"chart": drawn, "title": title}


@register.inclusion_tag("console/code.html")
def code(text: str, label: str = "Copy") -> dict[str, Any]:
    """A block of text with a button that copies it."""
    return {"text": text, "label": label}
