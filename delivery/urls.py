"""The pull API below /api/, under its two names."""
from django.urls import path

from delivery.pull.shortcut import PREFIXES
from delivery.pull.views import AckView, ExtendView, NackView, PullView, ReceiveView

VIEWS: dict[str, type[PullView]] = {"receive": ReceiveView, "ack": AckView, "nack": NackView, "extend": ExtendView}

urlpatterns = [path(f"{prefix}/<str:consumer>/{call}", view.as_view()) for prefix in PREFIXES for call, view in VIEWS.items()]
