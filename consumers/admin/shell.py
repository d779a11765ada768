"""What every console page has in common: colours, and the sidebar by what one may see."""
from __future__ import annotations

from typing import Any

from django.http import HttpRequest
from django.urls import reverse

# Title, icon, URL's name, permission.
_GROUPS: tuple[tuple[str, tuple[tuple[str, str, str, str], ...]], ...] = (
    ("", (
        ("Home", "home", "admin:index", ""),
        ("Sources", "database", "admin:consumers_source_changelist", "consumers.view_source"),
        ("Consumers", "outbound", "admin:consumers_consumer_changelist", "consumers.view_consumer"),
        ("Endpoints", "webhook", "admin:consumers_httpendpoint_changelist", "consumers.view_httpendpoint"),
    )),
    ("Messages", (
        ("Log", "list_alt", "admin:consumers_message_changelist", "consumers.view_message"),
        ("Stuck", "pause_circle", "admin:consumers_parked_changelist", "consumers.view_parked"),
        ("Attempts", "history", "admin:consumers_attempt_changelist", "consumers.view_attempt"),
    )),
    ("Watching", (
        ("Alerts", "notifications", "admin:consumers_alertepisode_changelist", "consumers.view_alertepisode"),
        ("Alert rules", "rule", "admin:consumers_alertrule_changelist", "consumers.view_alertrule"),
        ("Destinations", "send", "admin:consumers_alertdestination_changelist", "consumers.view_alertdestination"),
        ("Audit log", "shield_person", "admin:consumers_auditentry_changelist", "consumers.view_auditentry"),
    )),
    ("Access", (
        ("API tokens", "key", "admin:consumers_apitoken_changelist", "consumers.view_apitoken"),
        ("Users", "group", "admin:auth_user_changelist", "auth.view_user"),
        ("Roles", "badge", "admin:auth_group_changelist", "auth.view_group"),
    )),
    ("Help", (("API", "api", "docs", ""), ("Receiver", "inbox", "receiver", ""))),
)  # fmt: skip


def context(request: HttpRequest) -> dict[str, Any]:
    """unfold's global callback. Colours stand in console.css: a style element in the page would not be let in."""
    return {"colors": {}}


def navigation(request: HttpRequest) -> list[dict[str, Any]]:
    """The sidebar, for unfold. The entry whose address the page's begins with is lit; home only itself."""
    groups = []
    for title, links in _GROUPS:
        items = [
            {"title": text, "icon": icon, "link": (url := reverse(name)), "active": _is_here(request.path, url, name)}
            for text, icon, name, permission in links
            if not permission or request.user.has_perm(permission)
        ]
        if items:
            groups.append({**({"title": title, "separator": True} if title else {}), "items": items})
    return groups


def _is_here(path: str, url: str, name: str) -> bool:
    return path == url if name == "admin:index" else path.startswith(url)
