"""Log to customer: pull API, push pumps, broker."""
from django.apps import AppConfig


class DeliveryConfig(AppConfig):
    name = "delivery"

    def ready(self) -> None:
        from delivery import checks  # noqa: F401  (registers them)
