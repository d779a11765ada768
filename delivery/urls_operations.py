"""/health and /metrics."""
from django.urls import path

from delivery.operations import health, metrics

urlpatterns = [path("health", health, name="health"), path("metrics", metrics, name="metrics")]
