"""A client that is logged in as an administrator."""
from __future__ import annotations

import pytest
from django.contrib.auth import get_user_model
from django.test import Client


@pytest.fixture
def console(transactional_db: None) -> Client:
    client = Client()
    client.force_login(get_user_model().objects.create_superuser("admin", "", "password"))
    return client
