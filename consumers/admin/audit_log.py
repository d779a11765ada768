"""The audit log: to look at."""
from __future__ import annotations

from django.contrib import admin

from consumers.admin.log import ReadOnlyAdmin
from consumers.audit import AuditEntry


@admin.register(AuditEntry)
class AuditAdmin(ReadOnlyAdmin):
    list_display = ("at", "actor", "action", "subject", "count", "detail", "address")
    list_display_links = None
    list_filter = ("action",)
    search_fields = ("actor", "subject")
