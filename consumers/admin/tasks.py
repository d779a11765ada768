"""Users, roles and django-q2's failures, in the same clothes as the rest."""
from __future__ import annotations

from typing import Any

import django_q.admin  # noqa: F401  registers its own pages first, which are replaced below
from django.contrib import admin
from django.contrib.auth.admin import GroupAdmin as DjangoGroupAdmin
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.contrib.auth.models import Group, User
from django.http import HttpRequest
from django_q.models import Failure, OrmQ, Schedule, Success
from unfold.admin import ModelAdmin
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm

from consumers import audit
from consumers.admin.auditing import Audited

for model in (User, Group, Failure, OrmQ, Schedule, Success):
    if admin.site.is_registered(model):
        admin.site.unregister(model)


@admin.register(User)
class UserAdmin(DjangoUserAdmin, Audited):  # type: ignore[misc,type-arg]
    """Whoever has a login may enter; what one may do there is the role's."""

    form = UserChangeForm
    add_form = UserCreationForm
    change_password_form = AdminPasswordChangeForm
    list_display = ("username", "email", "roles", "is_active", "is_superuser", "last_login")
    fieldsets = (
        (None, {"fields": ("username", "password", "email")}),
        ("Access", {"fields": ("is_active", "groups", "is_superuser")}),
        ("Dates", {"fields": ("last_login", "date_joined")}),
    )

    @admin.display(description="Roles")
    def roles(self, user: User) -> str:
        return ", ".join(group.name for group in user.groups.all()) or ("everything" if user.is_superuser else "none")

    def get_queryset(self, request: HttpRequest) -> Any:
        return super().get_queryset(request).prefetch_related("groups")

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        """Nobody gives more than he has."""
        fixed = ("last_login", "date_joined")
        return fixed if request.user.is_superuser else (*fixed, "is_superuser")

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        above = obj is not None and obj.is_superuser and not request.user.is_superuser
        return bool(super().has_change_permission(request, obj)) and not above

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        above = obj is not None and obj.is_superuser and not request.user.is_superuser
        return bool(super().has_delete_permission(request, obj)) and not above

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        obj.is_staff = True  # a login has no other use here
        super().save_model(request, obj, form, change)

    def user_change_password(self, request: HttpRequest, id: str, form_url: str = "") -> Any:
        answer = super().user_change_password(request, id, form_url)
        if request.method == "POST" and answer.status_code == 302:
            audit.record("change_password", f"user {User.objects.filter(pk=id).first()}")
        return answer


@admin.register(Group)
class GroupAdmin(DjangoGroupAdmin, Audited):  # type: ignore[misc]
    pass


@admin.register(Failure)
class FailedTaskAdmin(ModelAdmin):  # type: ignore[misc]
    list_display = ("name", "func", "started", "stopped", "result")

    def has_add_permission(self, request: Any) -> bool:
        return False
