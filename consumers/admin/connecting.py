"""Connect a database: paste its URL or fill in fields, see what is right and wrong while typing, choose tables."""
from __future__ import annotations

from typing import Any

import psycopg
from django import forms
from django.contrib import messages
from django.core.exceptions import ValidationError
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import reverse
from psycopg.conninfo import conninfo_to_dict

from consumers import changes, source_setup
from consumers.admin.pages import needs, page, posted
from consumers.models import SSL_MODES, Source
from consumers.preflight import Finding, findings
from consumers.publishing import SetupRefused, publish_tables
from consumers.source_connection import SourceUnreachable

ADD_SOURCE = "consumers.add_source"
FROM_URL = {"host": "host", "port": "port", "dbname": "database", "user": "username", "password": "password", "sslmode": "sslmode"}
UNDERSTOOD = {*FROM_URL, "application_name", "channel_binding", "options", "connect_timeout", "target_session_attrs"}


class ConnectForm(forms.Form):
    """What a person knows of his database. Whatever the URL says wins over the fields."""

    name = forms.CharField(max_length=63, help_text="How the source is called here, such as shop.")
    url = forms.CharField(
        required=False, label="Connection URL", widget=forms.TextInput(attrs={"autocomplete": "off", "spellcheck": "false"}),
        help_text="postgresql://user:password@host:5432/database, or fill in the fields below.",
    )  # fmt: skip
    host = forms.CharField(required=False, max_length=255)
    port = forms.IntegerField(required=False, min_value=1, max_value=65535, initial=5432)
    database = forms.CharField(required=False, max_length=63)
    username = forms.CharField(required=False, max_length=63, label="User")
    password = forms.CharField(required=False, widget=forms.PasswordInput(attrs={"autocomplete": "off"}))
    sslmode = forms.ChoiceField(
        required=False, label="SSL", choices=[("", "prefer on this machine, require elsewhere"), *((mode, mode) for mode in SSL_MODES)]
    )
    ssl_root_cert = forms.CharField(
        required=False, label="Certificate of the authority", widget=forms.Textarea(attrs={"rows": 3}),
        help_text="PEM text or a file's path; for verify-ca and verify-full.",
    )  # fmt: skip
    slot_name = forms.CharField(initial="sequin_slot", max_length=63, label="Slot", help_text="Made when it is not there.")
    publication_name = forms.CharField(
        initial="sequin_pub", max_length=63, label="Publication", help_text="Made when it is not there, with the tables chosen below."
    )

    def clean(self) -> dict[str, Any]:
        given = super().clean() or {}
        if given.get("url"):
            given.update(read_url(given["url"]))
        for field, what in (("host", "host"), ("database", "database"), ("username", "user")):
            if not given.get(field):
                self.add_error("url" if given.get("url") else field, f"The {what} is missing.")
        given["port"] = given.get("port") or 5432
        return given

    def source(self) -> Source:
        """The source as it would be saved. Raises ValidationError."""
        names = ("name", "host", "port", "database", "username", "password", "sslmode", "ssl_root_cert", "slot_name", "publication_name")
        source = Source(**{name: self.cleaned_data[name] for name in names})
        source.full_clean()
        return source


def read_url(url: str) -> dict[str, Any]:
    """A connection URL, or libpq's `host=… dbname=…`, as fields. Raises ValidationError at `url`, without the password."""
    try:
        parts = conninfo_to_dict(url.strip())
    except psycopg.Error:
        raise ValidationError({"url": "Expected postgresql://user:password@host:5432/database."}) from None
    unknown = [name for name in parts if name not in UNDERSTOOD]
    if unknown:
        raise ValidationError({"url": f"The URL says {', '.join(unknown)}, which is not understood here: leave it out, or fill in the fields."})
    found: dict[str, Any] = {FROM_URL[name]: value for name, value in parts.items() if name in FROM_URL and value is not None}
    if "port" in found:
        text = str(found["port"])
        if not text.isdigit() or not 1 <= int(text) <= 65535:
            raise ValidationError({"url": "Expected one port, from 1 to 65535."})
        found["port"] = int(text)
    return found


@needs(ADD_SOURCE)
def add(request: HttpRequest) -> HttpResponse:
    """The form; posted, it makes the source. By htmx, so that a refusal leaves what was typed."""
    if request.method != "POST":
        return page(request, "console/connect.html", "Connect a database", form=ConnectForm())
    form = ConnectForm(request.POST)
    source = _source_of(form)
    if source is None:
        return _answer(request, form)
    chosen = request.POST.getlist("tables")
    try:
        changes.save(source)
    except ValidationError as error:
        _blame(form, error)
        return _answer(request, form)
    try:
        if chosen:
            publish_tables(source, chosen)
    except (SetupRefused, SourceUnreachable) as error:
        messages.warning(request, f"Connected, but the tables were not published: {error}")
    messages.success(request, f"{source.name} is connected. Its changes are kept from now on. Next: add a consumer.")
    answer = HttpResponse(status=204)
    answer.headers["HX-Redirect"] = reverse("admin:consumers_source_page", args=[source.pk])
    return answer


@posted
@needs(ADD_SOURCE)
def check(request: HttpRequest) -> HttpResponse:
    """What is right and wrong with what was typed so far, and the tables there are. A name may still be missing."""
    given = request.POST.copy()
    given["name"] = request.POST.get("name") or "source"
    form = ConnectForm(given)
    source = _source_of(form)
    if source is None:
        return _answer(request, form)
    found = [_expected(finding, source) for finding in findings(source)]
    tables: list[dict[str, Any]] = []
    if found[0].ok:
        try:
            tables = source_setup.all_tables(source)
        except SourceUnreachable:
            pass
    context = {
        "form": form, "findings": sorted(found, key=lambda one: (one.ok, not one.blocking)), "good": sum(one.ok for one in found),
        "ready": all(one.ok or not one.blocking for one in found), "tables": tables,
        "ours": not any(one.name == "publication" and "publishes" in one.text for one in found), "source": source,
    }  # fmt: skip
    return render(request, "console/connect_check.html", context)


def _source_of(form: ConnectForm) -> Source | None:
    if not form.is_valid():
        return None
    try:
        return form.source()
    except ValidationError as error:
        _blame(form, error)
        return None


def _blame(form: ConnectForm, error: ValidationError) -> None:
    for field, texts in changes.errors_of(error).items():
        form.add_error(field if field in form.fields else None, texts)


def _answer(request: HttpRequest, form: ConnectForm) -> HttpResponse:
    listed = [
        (form.fields[name].label or name.replace("_", " ").capitalize() if name in form.fields else "", texts)
        for name, texts in form.errors.items()
    ]
    return render(request, "console/problems.html", {"problems": listed})


def _expected(finding: Finding, source: Source) -> Finding:
    """A slot and a publication that are missing are made on connecting."""
    if finding.name == "slot" and finding.text.startswith("there is no slot"):
        return finding._replace(ok=True, text=f"the slot {source.slot_name} is made on connecting", sql="")
    if finding.name == "publication" and finding.text.startswith("there is no publication"):
        return finding._replace(ok=True, text=f"the publication {source.publication_name} is made on connecting", sql="")
    return finding
