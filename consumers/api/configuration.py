"""List, create, read, update and delete sources, endpoints and consumers."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from django.db import IntegrityError
from django.db.models import ProtectedError, QuerySet
from drf_spectacular.utils import OpenApiParameter, extend_schema, inline_serializer
from rest_framework import serializers
from rest_framework.exceptions import PermissionDenied, ValidationError
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from consumers import changes
from consumers.api import pages
from consumers.api.body import read_object
from consumers.api.errors import BadParameter, Invalid
from consumers.api.lookup import demand_all, find, find_consumer
from consumers.api.shapes import ConsumerShape, EndpointShape, Shape, SourceShape, assign
from consumers.hosting import PAUSE_COSTS
from consumers.models import Consumer, HttpEndpoint, Source
from consumers.store import lifecycle

PAGING = [
    OpenApiParameter("cursor", str, description="The `next` of an earlier answer."),
    OpenApiParameter("limit", int, description="1 to 500, default 50."),
]


def listing_of(shape: type[Shape], name: str) -> Any:
    """The schema of `{"data": […], "next": …}`."""
    return inline_serializer(f"{name}List", {"data": shape(many=True), "next": serializers.CharField(allow_null=True)})


def typed(shape: Shape) -> dict[str, Any]:
    """What a request gave, types judged. Raises Invalid."""
    try:
        shape.is_valid(raise_exception=True)
    except ValidationError as error:
        raise Invalid(_flat(error.detail)) from None
    return dict(shape.validated_data)


def save(thing: Any) -> None:
    """Save with all effects; someone faster with the same name is a validation error."""
    try:
        changes.save(thing)
    except IntegrityError:
        raise Invalid({"name": [f"{thing.name} exists already, or what it refers to is gone"]}) from None


def flag(given: Mapping[str, str], name: str) -> bool:
    """A query parameter that is true or false, default false."""
    text = given.get(name, "false").lower()
    if text not in ("true", "false", "1", "0", ""):
        raise BadParameter(f"{name}: expected true or false, got {text!r}")
    return text in ("true", "1", "")


def _flat(detail: Any) -> dict[str, list[str]]:
    errors: dict[str, list[str]] = {}
    for field, problems in detail.items():
        if isinstance(problems, Mapping):
            errors[field] = [f"{key}: {' '.join(map(str, texts))}" for key, texts in problems.items()]
        else:
            errors[field] = [str(problem) for problem in problems]
    return errors


class SavedSourceShape(SourceShape):
    """What is answered of a source that was changed."""

    warning = serializers.CharField(required=False, help_text="Of a paused one: what pausing costs.")

    class Meta(SourceShape.Meta):
        fields = [*SourceShape.Meta.fields, "warning"]


class SavedConsumerShape(ConsumerShape):
    """What is answered of one consumer."""

    backlog = inline_serializer(
        "Backlog",
        {state: serializers.IntegerField() for state in ("waiting", "out", "retry", "blocked", "error", "dead")},
        help_text="How many messages an edit applies to.", read_only=True,
    )  # fmt: skip
    notices = inline_serializer(
        "Notice", {"text": serializers.CharField(), "sql": serializers.CharField()}, many=True, read_only=True,
        help_text="Of what was just saved: where a filter is not exact, and the SQL that mends it.",
    )  # fmt: skip

    class Meta(ConsumerShape.Meta):
        fields = [*ConsumerShape.Meta.fields, "backlog", "notices"]


class ConfigurationView(APIView):
    """What the views of one kind of object share."""

    model: ClassVar[Any]
    shape: ClassVar[type[Shape]]

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super().initial(request, *args, **kwargs)
        demand_all(request.user)  # type: ignore[arg-type]

    def reachable(self) -> QuerySet[Any]:
        found: QuerySet[Any] = self.model.objects.all()
        return found

    def thing(self, name: str) -> Any:
        return find(self.model, name)

    def answer(self, thing: Any) -> dict[str, Any]:
        """What is answered of a thing that was saved."""
        return dict(self.shape(thing).data)


class ListView(ConfigurationView):
    def get(self, request: Request) -> Response:
        found, cursor = pages.page(self.reachable(), request.query_params)
        return Response({"data": self.shape(found, many=True).data, "next": cursor})

    def post(self, request: Request) -> Response:
        given = typed(self.shape(data=read_object(request)))
        thing = self.model()
        assign(thing, given)
        save(thing)
        return Response(self.answer(thing), status=201)


class DetailView(ConfigurationView):
    def get(self, request: Request, name: str) -> Response:
        return Response(self.shape(self.thing(name)).data)

    def patch(self, request: Request, name: str) -> Response:
        thing = self.thing(name)
        assign(thing, typed(self.shape(thing, data=read_object(request), partial=True)))
        save(thing)
        return Response(self.answer(thing))

    def delete(self, request: Request, name: str) -> Response:
        thing = self.thing(name)
        try:
            self.remove(thing, request.query_params)
        except (ProtectedError, IntegrityError):
            raise changes.InUse(f"{thing.name} is in use") from None
        return Response(status=204)

    def remove(self, thing: Any, given: Mapping[str, str]) -> None:
        changes.delete(thing)


class SourceKind(ConfigurationView):
    model, shape = Source, SourceShape


class EndpointKind(ConfigurationView):
    model, shape = HttpEndpoint, EndpointShape


class ConsumerKind(ConfigurationView):
    model, shape = Consumer, ConsumerShape

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        APIView.initial(self, request, *args, **kwargs)

    def reachable(self) -> QuerySet[Any]:
        found = Consumer.objects.select_related("source", "endpoint")
        mine = self.request.user.consumers  # type: ignore[union-attr]
        return found if mine is None else found.filter(pk__in=mine)

    def answer(self, thing: Consumer) -> dict[str, Any]:
        return whole(thing)

    def thing(self, name: str) -> Consumer:
        return find_consumer(name, self.request.user)  # type: ignore[arg-type]


@extend_schema(
    operation_id="sources_list", responses=listing_of(SourceShape, "Source"), parameters=PAGING, methods=["GET"]
)
@extend_schema(request=SourceShape, responses={201: SourceShape}, methods=["POST"])
class SourcesView(SourceKind, ListView):
    """All sources, in order of creation; make one."""


@extend_schema(responses=SourceShape, methods=["GET"])
@extend_schema(request=SourceShape, responses=SavedSourceShape, methods=["PATCH"])
@extend_schema(
    parameters=[OpenApiParameter("drop_slot", bool, description="Drop slot and publication too, where we made them.")],
    responses={204: None}, methods=["DELETE"],
)  # fmt: skip
class SourceView(SourceKind, DetailView):
    """One source. Pausing one answers with a `warning`: what that costs."""

    def patch(self, request: Request, name: str) -> Response:
        answer = super().patch(request, name)
        if answer.data["status"] == "paused":
            answer.data["warning"] = PAUSE_COSTS
        return answer

    def remove(self, thing: Source, given: Mapping[str, str]) -> None:
        changes.delete(thing, drop_replication=flag(given, "drop_slot"))


@extend_schema(
    operation_id="http_endpoints_list", responses=listing_of(EndpointShape, "Endpoint"), parameters=PAGING, methods=["GET"]
)
@extend_schema(request=EndpointShape, responses={201: EndpointShape}, methods=["POST"])
class EndpointsView(EndpointKind, ListView):
    """All endpoints, in order of creation; make one."""


@extend_schema(request=EndpointShape, responses=EndpointShape, methods=["GET", "PATCH"])
@extend_schema(responses={204: None}, methods=["DELETE"])
class EndpointView(EndpointKind, DetailView):
    """One endpoint."""


@extend_schema(
    operation_id="consumers_list", responses=listing_of(ConsumerShape, "Consumer"), parameters=PAGING, methods=["GET"]
)
@extend_schema(request=ConsumerShape, responses={201: SavedConsumerShape}, methods=["POST"])
class ConsumersView(ConsumerKind, ListView):
    """All consumers, in order of creation; make one."""

    def post(self, request: Request) -> Response:
        if request.user.consumers is not None:  # type: ignore[union-attr]
            raise PermissionDenied("the token reaches only some consumers; making one needs a token that reaches all")
        return super().post(request)


@extend_schema(request=ConsumerShape, responses=SavedConsumerShape, methods=["GET", "PATCH"])
@extend_schema(
    parameters=[OpenApiParameter("discard", bool, description="Delete it with what it has not delivered.")],
    responses={204: None}, methods=["DELETE"],
)  # fmt: skip
class ConsumerView(ConsumerKind, DetailView):
    """Answers carry `backlog`, how many messages an edit applies to, and `notices`, where a filter is not exact."""

    def get(self, request: Request, name: str) -> Response:
        return Response(self.answer(self.thing(name)))

    def remove(self, thing: Consumer, given: Mapping[str, str]) -> None:
        changes.delete(thing, discard=flag(given, "discard"))


def whole(consumer: Consumer) -> dict[str, Any]:
    """A consumer, its messages by state, and what somebody who just saved its filter should know."""
    backlog = lifecycle.backlog(consumer.pk)._asdict()
    return {**ConsumerShape(consumer).data, "backlog": backlog, "notices": [notice._asdict() for notice in consumer.notices]}
