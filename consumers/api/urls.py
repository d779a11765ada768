"""The management API below /api/."""
from django.urls import path

urlpatterns: list = []
