"""Make a consumer: which tables and actions, filter and transform tried on real rows, push or pull, and from where on."""
from __future__ import annotations

from typing import Any
from uuid import UUID

from django import forms
from django.contrib import messages
from django.core.exceptions import ValidationError
from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import reverse

from consumers import changes, outbound, source_setup
from consumers.admin.forms import lines_of_headers
from consumers.admin.pages import needs, page, posted
from consumers.models import ACTIONS, DEFAULT_ACTIONS, Consumer, HttpEndpoint, Source
from consumers.source_connection import SourceUnreachable

ADD_CONSUMER, ADD_ENDPOINT = "consumers.add_consumer", "consumers.add_httpendpoint"
NEW = "new"
TUNED = ("batch_size", "concurrency", "ack_wait_ms", "max_ack_pending", "max_deliver", "max_per_group", "max_backlog_bytes", "on_full")


class ConsumerForm(forms.ModelForm):  # type: ignore[type-arg]
    """The fields of a consumer and, for a new endpoint, of that."""

    endpoint_name = forms.CharField(required=False, max_length=63, label="Name of the endpoint")
    endpoint_url = forms.CharField(required=False, max_length=2000, label="URL", help_text="Each message, or batch, is POSTed there.")
    headers = forms.CharField(
        required=False, label="Headers", widget=forms.Textarea(attrs={"rows": 2, "placeholder": "x-team: shop"}), help_text="One a line."
    )
    secret_headers = forms.CharField(
        required=False, label="Secret headers", widget=forms.Textarea(attrs={"rows": 2, "placeholder": "authorization: Bearer …"}),
        help_text="Kept encrypted and never shown again.",
    )  # fmt: skip

    class Meta:
        model = Consumer
        fields = ["name", "source", "kind", "stream", "where", "transform", "start_from", "path", *TUNED]
        widgets = {
            "where": forms.Textarea(attrs={"rows": 3, "placeholder": "status = 'paid' AND total > 100"}),
            "transform": forms.Textarea(
                attrs={"rows": 6, "placeholder": "function transform(action, record, changes, metadata)\n  return record\nend"}
            ),
        }
        help_texts = {
            "name": "How the consumer is called here and in the API, such as orders-worker.",
            "path": "Put behind the endpoint's URL.",
            "batch_size": "Messages in one push, at most.",
            "concurrency": "Pushes at a time, at most.",
            "ack_wait_ms": "How long one may take over a message before another gets it.",
            "max_ack_pending": "Messages out at a time, at most.",
        }

    def _get_validation_exclusions(self) -> set[str]:
        return {*super()._get_validation_exclusions(), "endpoint"}  # type: ignore[misc]

    def _post_clean(self) -> None:
        """The model's own rules are applied by `changes.save`, once the endpoint is known."""
        opts = self._meta
        self.instance = forms.models.construct_instance(self, self.instance, opts.fields, opts.exclude)

    def new_endpoint(self) -> HttpEndpoint:
        """Raises ValidationError, at the fields of this form."""
        given = self.cleaned_data
        endpoint = HttpEndpoint(
            name=given["endpoint_name"] or f"{given['name']}-endpoint", url=given["endpoint_url"],
            headers=lines_of_headers(given["headers"], "headers"), secret_headers=lines_of_headers(given["secret_headers"], "secret_headers"),
        )  # fmt: skip
        try:
            endpoint.full_clean()
        except ValidationError as error:
            renamed = {"name": "endpoint_name", "url": "endpoint_url"}
            raise ValidationError({renamed.get(name, name): texts for name, texts in changes.errors_of(error).items()}) from None
        return endpoint


@needs(ADD_CONSUMER)
def add(request: HttpRequest) -> HttpResponse:
    """The form; posted by htmx, it makes the consumer, or says what is wrong and leaves what was typed."""
    if request.method != "POST":
        source = Source.objects.filter(pk=request.GET.get("source")).first() if _is_uuid(request.GET.get("source")) else None
        form = ConsumerForm(initial={"source": source or Source.objects.first(), "kind": "pull"})
        return page(
            request, "console/create_consumer.html", "Add a consumer", form=form, endpoints=HttpEndpoint.objects.all(), new=NEW,
            actions=[(action, action in DEFAULT_ACTIONS) for action in ACTIONS], tuned=[form[name] for name in TUNED],
            has_sources=Source.objects.exists(),
        )  # fmt: skip
    form = ConsumerForm(request.POST)
    if not form.is_valid():
        return _problems(request, form)
    try:
        with transaction.atomic():
            consumer = _consumer(request, form)
            made = consumer.endpoint if consumer.endpoint and consumer.endpoint._state.adding else None
            if made is not None:
                changes.save(made)
                consumer.endpoint = made
            changes.save(consumer)
    except ValidationError as error:
        _blame(form, error)
        return _problems(request, form)
    messages.success(request, f"{consumer.name} is ready.")
    answer = HttpResponse(status=204)
    answer.headers["HX-Redirect"] = reverse("admin:consumers_consumer_page", args=[consumer.pk]) + "?tab=code"
    return answer


@needs(ADD_CONSUMER)
def tables(request: HttpRequest) -> HttpResponse:
    """The tables of the chosen source, to tick."""
    source = Source.objects.filter(pk=request.GET.get("source")).first() if _is_uuid(request.GET.get("source")) else None
    if source is None:
        return HttpResponse("")
    try:
        found = source_setup.all_tables(source)
    except SourceUnreachable as error:
        return render(request, "console/problems.html", {"problems": [("", [str(error)])]})
    found.sort(key=lambda table: (not table["published"], table["name"]))
    return render(request, "console/create_tables.html", {"tables": found, "source": source})


@posted
@needs(ADD_ENDPOINT)
def try_endpoint(request: HttpRequest) -> HttpResponse:
    """Send a test message to the endpoint as it was typed, or chosen."""
    form = ConsumerForm(request.POST)
    form.is_valid()
    chosen = request.POST.get("endpoint", NEW)
    try:
        endpoint = HttpEndpoint.objects.get(pk=chosen) if _is_uuid(chosen) else _typed_endpoint(form)
    except (ValidationError, HttpEndpoint.DoesNotExist) as error:
        texts = error.messages if isinstance(error, ValidationError) else ["There is no such endpoint any more."]
        return render(request, "console/problems.html", {"problems": [("", texts)]})
    outcome = outbound.send_test(endpoint, request.POST.get("path", "")[:2000])
    return render(request, "console/outcome.html", {"outcome": outcome, "url": endpoint.url})


def _typed_endpoint(form: ConsumerForm) -> HttpEndpoint:
    given = {**dict.fromkeys(("endpoint_url", "headers", "secret_headers"), ""), **form.cleaned_data}
    endpoint = HttpEndpoint(
        name="test", url=given["endpoint_url"], headers=lines_of_headers(given["headers"], "headers"),
        secret_headers=lines_of_headers(given["secret_headers"], "secret_headers"),
    )  # fmt: skip
    endpoint.clean()
    return endpoint


def _consumer(request: HttpRequest, form: ConsumerForm) -> Consumer:
    """The consumer as asked for; its endpoint may be new, and is then saved with it. Raises ValidationError."""
    consumer: Consumer = form.instance
    consumer.tables = [table for table in request.POST.getlist("tables") if table]
    if request.POST.get("tables_by_pattern"):
        consumer.tables += [name.strip() for name in request.POST["tables_by_pattern"].split(",") if name.strip()]
    consumer.actions = [action for action in request.POST.getlist("actions") if action in ACTIONS]
    consumer.group_columns = [name.strip() for name in request.POST.get("group_columns", "").split(",") if name.strip()]
    if consumer.kind == "push":
        chosen = request.POST.get("endpoint", NEW)
        consumer.endpoint = HttpEndpoint.objects.filter(pk=chosen).first() if _is_uuid(chosen) else form.new_endpoint()
    else:
        consumer.path = ""
    if not consumer.actions:
        raise ValidationError("Choose at least one action.")
    return consumer


def _blame(form: ConsumerForm, error: ValidationError) -> None:
    for field, texts in changes.errors_of(error).items():
        known = field in form.fields or field == "non_field_errors"
        form.add_error(field if field in form.fields else None, texts if known else [f"{field}: {text}" for text in texts])


def _problems(request: HttpRequest, form: ConsumerForm) -> HttpResponse:
    listed = [(form.fields[name].label if name in form.fields else "", texts) for name, texts in form.errors.items()]
    return render(request, "console/problems.html", {"problems": listed})


def _is_uuid(text: Any) -> bool:
    try:
        UUID(str(text))
    except ValueError:
        return False
    return True
