"""Erase a key: the form, the exact counts, and then the deed. For admins."""
from __future__ import annotations

from typing import Any
from uuid import UUID

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect
from django.urls import reverse

from consumers import audit
from consumers.admin.listing import key_text
from consumers.admin.pages import ask, is_confirmed, needs, page
from consumers.models import Source
from consumers.signals import key_erased
from consumers.store import erasure
from consumers.store.models import RelationVersion
from consumers.words import counted

ERASE = "consumers.erase_message"


@needs(ERASE)
def erase(request: HttpRequest, pk: UUID) -> HttpResponse:
    source = get_object_or_404(Source, pk=pk)
    back = reverse("admin:consumers_source_page", args=[pk])
    tables = sorted({str(one) for one in RelationVersion.objects.filter(source=pk)})
    if request.method != "POST":
        return page(request, "console/erase.html", "Erase a key", source=source, tables=tables, back=back)
    table, typed = request.POST.get("table", ""), request.POST.get("key", "").strip()
    if table not in tables or not typed or "\0" in typed:
        messages.error(request, "Choose a table, and say which key.")
        return redirect(request.path)
    key = key_text(typed)
    if not is_confirmed(request):
        found = erasure.count(pk, table, key)
        return ask(
            request, title="Erase a key", back=back, button=f"Erase {counted(found.messages, 'message')}", details=_counts(found),
            question=f"Overwrite the key {typed} of {table} in the log of {source.name}? This cannot be taken back."
            " What is still to be delivered of it arrives empty. The source and backups are not touched.",
        )  # fmt: skip
    done = erasure.erase(pk, table, key)
    key_erased.send(Source, source_id=pk, table=table)
    # The key itself is what must be forgotten: the audit log says which table and how many.
    audit.record("erase", source, done.messages, table=table, attempts=done.attempts, parked=done.parked)
    messages.success(request, f"Erased: {counted(done.messages, 'message')}, {counted(done.attempts, 'attempt')}, {counted(done.parked, 'parked row')}.")
    return redirect(back)


def _counts(found: erasure.Erased) -> list[tuple[str, Any]]:
    return [("Messages in the log", f"{found.messages:,}"), ("Attempts", f"{found.attempts:,}"), ("Parked rows", f"{found.parked:,}")]
