"""What a reader of a run's folder, its logs or its dashboards must not find: secrets."""

import contextlib
import hashlib
import logging
import os
import re
from typing import Any

HIDDEN = "[redacted]"
VARIABLE = re.compile(  # of an environment
    r"(?<![A-Z])(?:SECRETS?|TOKEN|CREDENTIALS?|AUTH|AUTHORIZATION|PAT|PWD|KEY)(?![A-Z])(?!_IDS?$)|PASSWORD|PASSWD|PASSPHRASE",
    re.IGNORECASE,
)
DIRECTORIES = ("PWD", "OLDPWD")  # a shell's
SHORTEST = 8  # characters; shorter values would hide harmless text
URL = re.compile(r"\b(?!file:)([a-z][a-z0-9+.-]*://)(?:[^\s/]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?", re.IGNORECASE)
COMMAND = re.compile(r"(?<![\w.])pipe:\s*(\S*)(.*)", re.IGNORECASE | re.DOTALL)


def redacted(value: Any) -> Any:
    """The same text, or dicts and lists of it, without secrets, which are known by their value alone.

    A URL loses user, password and query (pre-signed ones carry a secret there). A `pipe:` command keeps its program and a
    digest. The values of environment variables such as HF_TOKEN are hidden wherever they stand.
    """
    if isinstance(value, dict):
        return {key: redacted(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(content) for content in value]
    if not isinstance(value, str):
        return value
    for secret in environment_secrets():
        value = value.replace(secret, HIDDEN)
    value = COMMAND.sub(lambda found: f"pipe:{found[1]} [{hashlib.sha256(found[0].encode()).hexdigest()[:12]}]", value)
    return URL.sub(r"\1\2", value)


def environment_secrets() -> list[str]:
    """The longest first. The path of a key file is no secret."""
    found = [value for name, value in os.environ.items() if name not in DIRECTORIES and VARIABLE.search(name)]
    return sorted((value for value in found if len(value) >= SHORTEST and not os.path.exists(value)), key=len, reverse=True)


def hide_in_logs() -> None:
    """From now on no log record of this process holds a secret, whoever writes it and wherever it goes."""
    make = logging.getLogRecordFactory()

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        with contextlib.suppress(Exception):  # a format that does not fit its arguments is told by whoever handles the record
            made.msg, made.args = redacted(made.getMessage()), None
        return made

    logging.setLogRecordFactory(record)
