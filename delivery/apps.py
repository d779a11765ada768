"""Log to customer: pull API, push pumps, broker."""
import os

from django.apps import AppConfig
from django.conf import settings


class DeliveryConfig(AppConfig):
    name = "delivery"

    def ready(self) -> None:
        from consumers import tokens  # noqa: F401  (connects its receiver)
        from delivery import checks  # noqa: F401  (registers them)
        from delivery.receiver import forgetting  # noqa: F401  (connects its receiver)

        if settings.IS_WEB:
            from delivery.pull.waiting import close_on_stop_signal

            # The web server's worker is forked from here; where it is spawned instead, it comes through here itself.
            os.register_at_fork(after_in_child=close_on_stop_signal)
            close_on_stop_signal()
