"""Secrets are removed from text, and ordinary text stays."""

import logging
from typing import Any

import pytest
from PIL import Image

from lcm.app.images import save_png
from lcm.runtime.redaction import HIDDEN, hide_in_logs, redacted

SECRET = "hunter2-hunter2"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"https://me:{SECRET}@host:8080/a/{{000..9}}.tar?X-Amz-Signature={SECRET}&b=1", "https://host:8080/a/{000..9}.tar"),
        (f"s3://{SECRET}@bucket/a.tar#access={SECRET}", "s3://bucket/a.tar"),
        (
            f"cannot read 'https://u:{SECRET}@host/a' and http://host/b?{SECRET}",
            "cannot read 'https://host/a' and http://host/b",
        ),
    ],
)
def test_url_secrets_are_removed(text: str, left: str) -> None:
    assert redacted(text) == left
    assert redacted(redacted(text)) == left


@pytest.mark.parametrize("text", [f"pipe:curl -H 'x: {SECRET}' https://host/a.tar", f"a=['pipe:aws --key {SECRET} s3://b']"])
def test_command_keeps_program_and_digest(text: str) -> None:
    assert SECRET not in redacted(text)
    assert redacted(text) != redacted(text.replace(SECRET, "other"))


ORDINARY = [
    "model.tokenizer=CLIPTokenizer",
    "eos_token: <|endoftext|>",
    "eos_token_id: 1",
    "max_tokens=77",
    "author: me",
    "hf://datasets/owner/name@main/a.tar",
    "file:///data/0000?.tar",
    "data/0000?.tar",
    "keys=3",
    "a sign that says password: open",
    "token_dim: 128",
    "+x.api_key=typed",
    "Authorization: Bearer of the ring",
    "model.w_max=8",
    "https://host/a/{000..123}.tar",
]


def test_ordinary_text_stays() -> None:
    assert [redacted(text) for text in ORDINARY] == ORDINARY


def test_containers_are_searched_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    config = {
        "token_dim": 128,
        "max_token": 77,
        "api_key": SECRET,
        "token": "cat",
        "a": [f"https://{SECRET}2@h/x", 3, 1.5, None],
    }
    assert redacted(config) == {
        "token_dim": 128,
        "max_token": 77,
        "api_key": HIDDEN,
        "token": "cat",
        "a": ["https://h/x", 3, 1.5, None],
    }


def test_environment_secrets_are_redacted(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    names = ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PGPASSWORD", "DB_PASSWORD"]
    names += ["MYSQL_PWD", "AZURE_STORAGE_KEY", "GITHUB_PAT", "my_token", "CLIENT_SECRET", "HTTP_AUTH"]
    for name in names:
        with monkeypatch.context() as patch:
            patch.setenv(name, SECRET)
            assert redacted(f"note: {SECRET}!") == f"note: {HIDDEN}!", name
            patch.setenv(name, str(tmp_path))  # such as the path of a key file
            assert redacted(f"{tmp_path}/x") == f"{tmp_path}/x"
            patch.setenv(name, "on")
            assert redacted("turned on") == "turned on"


def test_other_variables_hide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PWD", "TOKENIZERS_PARALLELISM", "AUTHOR", "KEYBOARD", "AWS_ACCESS_KEY_ID", "PATH", "EDITOR"):
        monkeypatch.setenv(name, "/nowhere/apples")
    assert redacted("a photo of /nowhere/apples") == "a photo of /nowhere/apples"


def test_prompt_about_passwords_stays_in_the_png(tmp_path: Any) -> None:
    prompt = "a sign that says password: open, token=3"
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", prompt=redacted(prompt))
    assert prompt in Image.open(tmp_path / "a.png").text.values()


def test_log_records_hold_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogRecordFactory()
    try:
        hide_in_logs()
        logging.getLogger("HYDRA").warning("\t#%d : %s", 1, f"https://{SECRET}@host/a")
        logging.getLogger("x").warning("100%")
    finally:
        logging.setLogRecordFactory(before)
    assert [record.getMessage() for record in caplog.records] == ["\t#1 : https://host/a", "100%"]
