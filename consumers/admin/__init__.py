"""The console: what is configured, what is in the log, what is stuck. Django's admin in unfold's clothes."""
from consumers.admin import alerts, audit_log, consumers, endpoints, log, sources, tasks, tokens  # noqa: F401  (registers the pages)
