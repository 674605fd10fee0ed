"""Remove secrets from run directories, logs and dashboards."""

import contextlib
import hashlib
import logging
import os
import re
from typing import Any

HIDDEN = "[redacted]"
VARIABLE = re.compile(  # names of environment variables that hold secrets
    r"(?<![A-Z])(?:SECRETS?|TOKEN|CREDENTIALS?|AUTH|AUTHORIZATION|PAT|PWD|KEY)(?![A-Z])(?!_IDS?$)|PASSWORD|PASSWD|PASSPHRASE",
    re.IGNORECASE,
)
DIRECTORIES = ("PWD", "OLDPWD")  # set by shells
SHORTEST = 8  # characters; shorter values would hide harmless text
URL = re.compile(r"\b(?!file:)([a-z][a-z0-9+.-]*://)(?:[^\s/]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?", re.IGNORECASE)
COMMAND = re.compile(r"(?<![\w.])pipe:\s*(\S*)(.*)", re.IGNORECASE | re.DOTALL)


def redacted(value: Any) -> Any:
    """Return text, or dicts and lists of text, without secrets. Secrets are recognised by value, not by key.

    A URL loses user, password and query, where pre-signed URLs carry a secret. A `pipe:` command keeps its program and a
    digest. The values of environment variables such as HF_TOKEN are replaced.
    """
    if isinstance(value, dict):
        return {key: redacted(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(content) for content in value]
    if not isinstance(value, str):
        return value
    for secret in environment_secrets():
        value = value.replace(secret, HIDDEN)
    value = COMMAND.sub(lambda match: f"pipe:{match[1]} [{hashlib.sha256(match[0].encode()).hexdigest()[:12]}]", value)
    return URL.sub(r"\1\2", value)


def environment_secrets() -> list[str]:
    """Return the values of environment variables that hold secrets, longest first. The path of a key file is no secret."""
    values = [value for name, value in os.environ.items() if name not in DIRECTORIES and VARIABLE.search(name)]
    return sorted((value for value in values if len(value) >= SHORTEST and not os.path.exists(value)), key=len, reverse=True)


def hide_in_logs() -> None:
    """Remove secrets from every log record of this process."""
    make = logging.getLogRecordFactory()

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        log_record = make(*args, **kwargs)
        with contextlib.suppress(Exception):  # handlers report a format that does not fit its arguments
            log_record.msg, log_record.args = redacted(log_record.getMessage()), None
        return log_record

    logging.setLogRecordFactory(record)
