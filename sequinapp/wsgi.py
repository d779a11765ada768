"""The WSGI application that granian serves."""
import os

from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "sequinapp.settings")

application = get_wsgi_application()

if served := os.environ.get("SEQUIN_WEB_BEATS"):
    from sequinapp.management.commands.run_web import beat_while_serving

    beat_while_serving(served)
