"""Source to log: reads the WAL and appends to the store."""
from django.apps import AppConfig


class CaptureConfig(AppConfig):
    name = "capture"
