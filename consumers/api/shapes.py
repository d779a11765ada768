"""The JSON shapes of sources, endpoints and consumers, both ways.

Only types are judged here; values are judged by the models' `full_clean()`, as in admin and loaddata. Unknown and wrong
fields are refused. Secrets go in and come back as `********`; sent back so, they stay as they are.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rest_framework import serializers

from consumers.api.lookup import by_name_or_id
from consumers.fields import MASK
from consumers.models import Consumer, HttpEndpoint, Source



class Text(serializers.CharField):
    """A text and nothing that merely can be written as one; kept as it is."""

    default_error_messages = {"invalid": "expected a text"}

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"trim_whitespace": False, "allow_blank": True, "required": False, **options})

    def to_internal_value(self, data: Any) -> str:
        if not isinstance(data, str):
            self.fail("invalid")
        return super().to_internal_value(data)


class OptionalText(Text):
    """A text whose absence is written null."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_null": True, **options})

    def validate_empty_values(self, data: Any) -> tuple[bool, Any]:
        return (True, "") if data is None else super().validate_empty_values(data)

    def to_representation(self, value: Any) -> Any:
        return value or None


class Secret(Text):
    def to_representation(self, value: Any) -> str:
        return MASK if value else ""


class Whole(serializers.IntegerField):
    """A whole number, written as a number."""

    default_error_messages = {"invalid": "expected a whole number"}

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"required": False, **options})

    def to_internal_value(self, data: Any) -> int:
        if isinstance(data, bool) or not isinstance(data, int) or abs(data) >= 2**63:
            self.fail("invalid")
        return data


class Headers(serializers.DictField):
    def __init__(self, **options: Any) -> None:
        super().__init__(child=Text(), **{"required": False, **options})


class SecretHeaders(Headers):
    def to_representation(self, value: Any) -> dict[str, str]:
        return dict.fromkeys(value, MASK)


class Named(serializers.SlugRelatedField):
    """Another object by its name; its id is understood too."""

    default_error_messages = {"does_not_exist": "there is none with this name or id", "invalid": "expected a name or an id"}

    def __init__(self, **options: Any) -> None:
        super().__init__(slug_field="name", **{"required": False, **options})

    def to_internal_value(self, data: Any) -> Any:
        if not isinstance(data, str):
            self.fail("invalid")
        queryset = self.get_queryset()
        assert queryset is not None
        found = by_name_or_id(queryset.model, data)
        if found is None:
            self.fail("does_not_exist")
        return found


class Shape(serializers.ModelSerializer[Any]):
    """What the three have in common."""

    TOLD: ClassVar[tuple[str, ...]] = ()
    """What answers tell besides: sent back with the rest, it means nothing."""

    id = serializers.UUIDField(read_only=True)
    name = Text()
    created_at = serializers.DateTimeField(read_only=True)
    updated_at = serializers.DateTimeField(read_only=True)

    def to_internal_value(self, data: Any) -> Any:
        if not isinstance(data, Mapping):
            raise serializers.ValidationError({"non_field_errors": ["expected an object"]})
        writable = [name for name, field in self.fields.items() if not field.read_only]
        errors = {}
        for name in data:
            if self.instance is not None and name in self.TOLD:
                continue
            if name not in self.fields:
                errors[name] = [f"is not a field; expected some of {', '.join(writable)}"]
            elif self.fields[name].read_only and not self._is_unchanged(name, data[name]):
                errors[name] = ["is set by the service"]
        try:
            given = super().to_internal_value(data)
        except serializers.ValidationError as error:
            errors = {**error.detail, **errors}  # type: ignore[dict-item]
        if errors:
            raise serializers.ValidationError(errors)
        return given

    def _is_unchanged(self, name: str, value: Any) -> bool:
        """What was read may be sent back, as long as it says the same."""
        return self.instance is not None and self.to_representation(self.instance).get(name) == value


class SourceShape(Shape):
    TOLD = ("warning",)

    host = Text()
    port = Whole()
    database = Text()
    username = Text()
    password = Secret()
    sslmode = Text(help_text="Default: prefer for a local host, require for any other.")
    ssl_root_cert = Text()
    slot_name = Text()
    publication_name = Text()
    slot_failover = serializers.BooleanField(required=False, help_text="Make the slot one that standbys keep in step.")
    status = Text(help_text="active or paused")

    class Meta:
        model = Source
        fields = [
            "id", "name", "host", "port", "database", "username", "password", "sslmode", "ssl_root_cert", "slot_name",
            "publication_name", "slot_failover", "status", "created_at", "updated_at",
        ]  # fmt: skip

    def to_representation(self, instance: Any) -> Any:
        return {**super().to_representation(instance), "sslmode": instance.effective_sslmode}


class EndpointShape(Shape):
    url = Text()
    headers = Headers()
    secret_headers = SecretHeaders()
    signing_secret = Secret(help_text="whsec_…; made when none is given")
    timeout_ms = Whole()

    class Meta:
        model = HttpEndpoint
        fields = ["id", "name", "url", "headers", "secret_headers", "signing_secret", "timeout_ms", "created_at", "updated_at"]


class ConsumerShape(Shape):
    TOLD = ("backlog", "notices")

    source = Named(queryset=Source.objects.all())  # type: ignore[assignment]
    source_id = serializers.UUIDField(read_only=True)
    kind = Text(help_text="push or pull; fixed at creation")
    stream = Text()
    tables = serializers.ListField(child=Text(), required=False)
    actions = serializers.ListField(child=Text(), required=False)
    where = OptionalText()
    transform = OptionalText()
    group_columns = serializers.ListField(child=Text(), required=False)
    start_from = Text()
    ack_wait_ms = Whole()
    max_ack_pending = Whole()
    max_deliver = Whole(allow_null=True)
    max_per_group = Whole(allow_null=True)
    max_backlog_bytes = Whole(allow_null=True)
    on_full = OptionalText()
    status = Text(help_text="active, paused or disabled")
    endpoint = Named(queryset=HttpEndpoint.objects.all(), allow_null=True)
    endpoint_id = serializers.UUIDField(read_only=True, allow_null=True)
    path = Text()
    batch_size = Whole()
    concurrency = Whole()

    class Meta:
        model = Consumer
        fields = [
            "id", "name", "source", "source_id", "kind", "stream", "tables", "actions", "where", "transform", "group_columns",
            "start_from", "ack_wait_ms", "max_ack_pending", "max_deliver", "max_per_group", "max_backlog_bytes", "on_full",
            "status", "endpoint", "endpoint_id", "path", "batch_size", "concurrency", "created_at", "updated_at",
        ]  # fmt: skip


def assign(thing: Any, given: Mapping[str, Any]) -> None:
    """Set what was given; a mask leaves the secret as it is."""
    for name, value in given.items():
        if name in ("password", "signing_secret") and value == MASK:
            continue
        if name == "secret_headers":
            kept = thing.secret_headers
            value = {header: kept.get(header, text) if text == MASK else text for header, text in value.items()}
        if name == "sslmode" and not thing.sslmode and not thing._state.adding and value == thing.effective_sslmode:
            continue  # read back as what the default comes to; it stays the default
        setattr(thing, name, value)
