"""Model fields whose values are encrypted at rest, with keys of their own (ENCRYPTION_KEYS), apart from SECRET_KEY."""
from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from django.conf import settings
from django.db import models

MASK = "********"  # what is shown of a secret


class UndecryptableSecret(Exception):
    """None of ENCRYPTION_KEYS decrypts a stored secret."""

    def __init__(self, field: str) -> None:
        super().__init__(
            f"the stored {field} cannot be decrypted: none of ENCRYPTION_KEYS fits. Put the key it was saved with back,"
            " or save the secret again"
        )


@lru_cache(maxsize=8)
def _fernet(keys: tuple[str, ...]) -> MultiFernet:
    return MultiFernet([Fernet(key) for key in keys])


def encrypt(text: str) -> str:
    return _fernet(tuple(settings.ENCRYPTION_KEYS)).encrypt(text.encode()).decode()


def decrypt(token: str, field: str = "secret") -> str:
    try:
        return _fernet(tuple(settings.ENCRYPTION_KEYS)).decrypt(token.encode()).decode()
    except InvalidToken:
        raise UndecryptableSecret(field) from None


class EncryptedTextField(models.TextField):  # type: ignore[type-arg]
    """A text, encrypted in the database. The empty text stays empty."""

    def get_prep_value(self, value: Any) -> Any:
        return encrypt(str(value)) if value else ""

    def from_db_value(self, value: str | None, expression: Any, connection: Any) -> str:
        return decrypt(value, self.name) if value else ""


class EncryptedJSONField(models.TextField):  # type: ignore[type-arg]
    """A JSON value, encrypted in the database."""

    def get_prep_value(self, value: Any) -> Any:
        return encrypt(json.dumps(value or {}))

    def from_db_value(self, value: str | None, expression: Any, connection: Any) -> Any:
        return json.loads(decrypt(value, self.name)) if value else {}

    def to_python(self, value: Any) -> Any:
        if isinstance(value, str):
            try:
                return json.loads(value or "{}")
            except ValueError:
                return value  # the model's clean names it
        return value

    def value_to_string(self, obj: Any) -> str:
        return MASK
