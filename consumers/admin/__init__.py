"""The console: what is configured, what is in the log, what is stuck. Django's admin in unfold's clothes."""
from consumers.admin import configuration, log, tasks, tokens  # noqa: F401  (registers the pages)
