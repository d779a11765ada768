"""What is configured and what is stored: sources, endpoints, consumers, tokens, and the store."""
from django.apps import AppConfig


class ConsumersConfig(AppConfig):
    name = "consumers"
    verbose_name = "Sequin"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from consumers import roles, signals  # noqa: F401  (connects the receivers)
