"""The roles of the console: viewer, operator, admin. Groups made and kept in step on each migration.

A viewer looks; an operator also pauses, retries, discards and replays; an admin also configures, gives access and erases.
Groups of one's own may be made beside these.
"""
from __future__ import annotations

from typing import Any

from django.apps import apps
from django.contrib.auth.management import create_permissions
from django.contrib.auth.models import Group, Permission
from django.db.models import Q
from django.db.models.signals import post_migrate
from django.dispatch import receiver

VIEWER, OPERATOR, ADMIN = "viewer", "operator", "admin"
LOOKED_AT = (
    "source", "httpendpoint", "consumer", "message", "parked", "attempt", "alertrule", "alertdestination", "alertepisode",
)  # fmt: skip
OPERATED = ("operate_source", "operate_consumer", "view_auditentry")
APPS = ("consumers", "auth", "django_q")


@receiver(post_migrate)
def make_roles(sender: Any, using: str = "default", **_: Any) -> None:
    if getattr(sender, "name", "") != "consumers":
        return
    for label in APPS:
        create_permissions(apps.get_app_config(label), verbosity=0, using=using)
    ours = Permission.objects.using(using).filter(content_type__app_label="consumers")
    view = Q(codename__in=[f"view_{name}" for name in LOOKED_AT])
    access = Permission.objects.using(using).filter(
        Q(content_type__app_label="auth", content_type__model__in=("user", "group")) | Q(content_type__app_label="django_q", codename="view_failure")
    )
    for role, permissions in (
        (VIEWER, ours.filter(view)),
        (OPERATOR, ours.filter(view | Q(codename__in=OPERATED))),
        (ADMIN, ours | access),
    ):
        group, _created = Group.objects.using(using).get_or_create(name=role)
        group.permissions.set(permissions)
