"""Log to customer: pull API, push pumps, broker."""
from django.apps import AppConfig


class DeliveryConfig(AppConfig):
    name = "delivery"
