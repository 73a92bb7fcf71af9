"""How lines of the library's log are written: as text for people, or each as a JSON object for programs."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["text", "json"]


class JsonFormatter(logging.Formatter):
    """Writes a record as one line of JSON: ``time`` (ISO 8601, UTC), ``level``, ``logger``, ``message``, and ``error``
    with the traceback if it has one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def formatter(form: LogFormat) -> logging.Formatter:
    """What writes lines in this format."""
    return JsonFormatter() if form == "json" else logging.Formatter("ssd-ray: %(message)s")
