"""What looks like a secret is gone, and what only looks a little like one is not."""

import logging
from typing import Any

import pytest

from lcm.redaction import HIDDEN, hide_in_logs, redacted

SECRET = "hunter2-hunter2"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"https://me:{SECRET}@host:8080/a/{{000..9}}.tar?X-Amz-Signature={SECRET}&b=1", "https://host:8080/a/{000..9}.tar"),
        (f"https://{SECRET}@host/a.tar#access={SECRET}", "https://host/a.tar"),
        (f"s3://id:{SECRET}@bucket/a.tar", "s3://bucket/a.tar"),
        (
            f"cannot read 'https://u:{SECRET}@host/a' and http://host/b?{SECRET}",
            "cannot read 'https://host/a' and http://host/b",
        ),
        (f"+logger.wandb.api_key={SECRET}", f"+logger.wandb.api_key={HIDDEN}"),
        (f"HF_TOKEN: '{SECRET} x'", f"HF_TOKEN: {HIDDEN}"),
        (f'{{"Authorization": "Bearer {SECRET}"}}', f'{{"Authorization": {HIDDEN}}}'),
        (f"Authorization: Bearer {SECRET} next", f"Authorization: {HIDDEN} next"),
        (f"x.aws_secret_access_key={SECRET},y=1", f"x.aws_secret_access_key={HIDDEN},y=1"),
        (f"+note.token={SECRET},{SECRET}2, then", f"+note.token={HIDDEN}, then"),
        (f"password = {SECRET}", f"password = {HIDDEN}"),
    ],
)
def test_secrets_go_and_the_rest_stays(text: str, left: str) -> None:
    assert redacted(text) == left
    assert redacted(redacted(text)) == left


@pytest.mark.parametrize("text", [f"pipe:curl -H 'x: {SECRET}' https://host/a.tar", f"a=['pipe:aws --key {SECRET} s3://b']"])
def test_of_a_command_the_program_and_a_digest_are_left(text: str) -> None:
    assert SECRET not in redacted(text)
    assert redacted(text) != redacted(text.replace(SECRET, "other"))


@pytest.mark.parametrize(
    "text",
    [
        "model.tokenizer=CLIPTokenizer",
        "eos_token: <|endoftext|>",
        "eos_token_id: 1",
        "max_tokens=77",
        "author: me",
        "hf://datasets/owner/name@main/a.tar",
        "file:///data/0000?.tar",
        "data/0000?.tar",
        "keys=3",
        "model.w_max=8",
        "https://host/a/{000..123}.tar",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redacted(text) == text


def test_dicts_are_searched_by_name_and_by_value() -> None:
    given = {
        "a": {"api_key": SECRET, "token": None, "passwords": ["x"], "use_auth": True},
        "b": [f"https://{SECRET}@h/x", 3, 1.5],
    }
    hidden = {"a": {"api_key": HIDDEN, "token": None, "passwords": HIDDEN, "use_auth": True}, "b": ["https://h/x", 3, 1.5]}
    assert redacted(given) == hidden


def test_values_of_the_environment_are_found_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    monkeypatch.setenv("MY_TOKEN", "on")
    assert redacted(f"note: {SECRET}!") == f"note: {HIDDEN}!"
    assert redacted(f"{tmp_path}/x, turned on") == f"{tmp_path}/x, turned on"


def test_no_log_record_holds_one(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogRecordFactory()
    try:
        hide_in_logs()
        logging.getLogger("HYDRA").warning("\t#%d : %s", 1, f"+x.api_key={SECRET}")
        logging.getLogger("x").warning("100%")
    finally:
        logging.setLogRecordFactory(before)
    assert [record.getMessage() for record in caplog.records] == [f"\t#1 : +x.api_key={HIDDEN}", "100%"]
