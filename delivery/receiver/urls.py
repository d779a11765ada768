"""The receiver page."""
from django.urls import path

from delivery.receiver.views import arrivals, receiver

urlpatterns = [path("", receiver, name="receiver"), path("arrivals", arrivals, name="receiver-arrivals")]
