"""The application that ties the others together; it holds the commands that know them all."""
from django.apps import AppConfig


class SequinAppConfig(AppConfig):
    name = "sequinapp"
