"""What a reader of a run's folder, its logs or its dashboards must not find: secrets."""

import contextlib
import hashlib
import logging
import os
import re
from typing import Any

HIDDEN = "[redacted]"
PARTS = r"secrets?|passwords?|passwd|passphrase|credentials?|(?:api|access|private|secret)_?key|auth|authorization|token"
ORDINARY = "".join(f"(?<!{name}_)" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "special"))  # of a tokenizer
NAME = re.compile(rf"(?<![a-z]){ORDINARY}(?:{PARTS})(?![a-z]|_id$|_ids$)", re.IGNORECASE)
PAIR = re.compile(
    rf"([\w.+@-]*(?<![a-z]){ORDINARY}(?:{PARTS})(?![a-z])[\w-]*[\"']?\s*[=:]\s*)(?:(?:bearer|basic|token)\s+)?"
    r"(?!null\b|\[redacted\])(\"[^\"]*\"|'[^']*'|[^\s,;}\]]+(?:,(?![\w.+@-]+\s*[=:])[^\s,;}\]]+)*)",
    re.IGNORECASE,
)
URL = re.compile(r"\b(?!file:)([a-z][a-z0-9+.-]*://)(?:[^\s/]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?", re.IGNORECASE)
COMMAND = re.compile(r"(?<![\w.])pipe:\s*(\S*)(.*)", re.IGNORECASE | re.DOTALL)


def redacted(value: Any) -> Any:
    """The same text, or dicts and lists of it, without secrets.

    Of a URL user, password and query go (pre-signed ones carry a secret there), of a `pipe:` command all but its program and a
    digest; so do values under a name such as `api_key`, in a dict or written `api_key=...`, and the values of environment
    variables of such names, wherever they stand.
    """
    if isinstance(value, dict):
        return {key: HIDDEN if is_secret(key, content) else redacted(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(content) for content in value]
    if not isinstance(value, str):
        return value
    for secret in environment_secrets():
        value = value.replace(secret, HIDDEN)
    value = COMMAND.sub(lambda found: f"pipe:{found[1]} [{hashlib.sha256(found[0].encode()).hexdigest()[:12]}]", value)
    return PAIR.sub(rf"\1{HIDDEN}", URL.sub(r"\1\2", value))


def is_secret(key: Any, content: Any) -> bool:
    return NAME.search(str(key)) is not None and content not in (None, "") and not isinstance(content, bool)


def environment_secrets() -> list[str]:
    """Values of variables such as HF_TOKEN; short ones and the paths of key files would hide harmless text."""
    found = [value for name, value in os.environ.items() if NAME.search(name) and len(value) >= 8 and not os.path.exists(value)]
    return sorted(found, key=len, reverse=True)


def hide_in_logs() -> None:
    """From now on no log record of this process holds a secret, whoever writes it and wherever it goes."""
    make = logging.getLogRecordFactory()

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        with contextlib.suppress(Exception):  # a format that does not fit its arguments is told by whoever handles the record
            made.msg, made.args = redacted(made.getMessage()), None
        return made

    logging.setLogRecordFactory(record)
