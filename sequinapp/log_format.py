"""One line an event: plain for a terminal, JSON for a collector."""
from __future__ import annotations

import json
import logging
import time


class ConsoleFormatter(logging.Formatter):
    """`12:34:56 capture.reader: connected source=shop`."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno <= logging.INFO else f"{record.levelname} "
        line = f"{clock} {level}{record.name}: {record.getMessage()}".replace("\n", " | ")
        return line if not record.exc_info else f"{line} {self.formatException(record.exc_info)}"


class JsonFormatter(logging.Formatter):
    """`{"at": …, "level": …, "logger": …, "message": …}`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class WithoutRepeats(logging.Filter):
    """Lets the same line through once in REPEAT_AFTER_S: while its broker is away, django-q says so ten times a second."""

    REPEAT_AFTER_S = 10.0

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if record.created - self._said.get(text, -self.REPEAT_AFTER_S) < self.REPEAT_AFTER_S:
            return False
        if len(self._said) > 100:
            self._said.clear()
        self._said[text] = record.created
        return True
