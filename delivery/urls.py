"""The pull API below /api/, under its two names."""
from django.urls import path

from delivery.pull.views import AckView, ExtendView, NackView, ReceiveView

urlpatterns = [
    path(f"{prefix}/<str:consumer>/{call}", view.as_view())
    for prefix in ("http_pull_consumers", "sequin_streams")
    for call, view in (("receive", ReceiveView), ("ack", AckView), ("nack", NackView), ("extend", ExtendView))
]
