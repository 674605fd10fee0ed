"""The HTTP API of `lcm.serve`: images, errors and the queue."""

import io
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lcm.models.text_to_image import TextToImage
from tests.models.conftest import save_student

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from lcm.app.web import Served, make_app


@pytest.fixture(scope="module")
def models(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    student = save_student(tmp_path_factory.mktemp("pipelines") / "student", tiny_pipeline)
    served = {
        "student": Served("student", TextToImage.load(student), 2),
        "teacher": Served("teacher", TextToImage.load(str(tiny_pipeline)), 6),
    }
    for model in served.values():
        model.measure()
    return served


def client(models: dict[str, Served], queue: int = 4) -> TestClient:
    return TestClient(make_app(models, queue=queue, max_steps=20, max_side=64))


def test_image_is_that_of_sampling(models: dict[str, Served]) -> None:
    body = {"prompt": "rocket", "steps": 3, "w": 2.5, "seed": 7, "size": [32, 48]}
    answer = client(models).post("/api/draw", json=body)
    assert (answer.status_code, answer.headers["content-type"], answer.headers["x-steps"]) == (200, "image/png", "3")
    picture = Image.open(io.BytesIO(answer.content))
    [expected] = models["student"].model.images(["rocket"], [7], steps=3, w=2.5, size=[32, 48])
    assert bytes(picture.tobytes()) == expected[0].permute(1, 2, 0).numpy().tobytes()
    assert picture.text["parameters"].startswith("rocket\nNegative prompt: \nSteps: 3, Sampler: LCM, CFG scale: 3.5, Seed: 7")
    assert float(answer.headers["x-seconds"]) > 0


def test_defaults_are_those_of_the_models(models: dict[str, Served]) -> None:
    web = client(models)
    listing = web.get("/api/models").json()
    assert listing["student"] == {"name": "student", "size": [32, 32], "steps": 2, "takes_w": True, "guided": False, "w": 4.0}
    assert (listing["teacher"]["steps"], listing["teacher"]["guided"], listing["limits"]["max_steps"]) == (6, True, 20)
    assert web.post("/api/draw", json={"prompt": ""}).headers["x-steps"] == "2"
    assert web.post("/api/draw", json={"prompt": "", "model": "teacher"}).headers["x-steps"] == "6"


@pytest.mark.parametrize(("student_steps", "expected"), [(1, 1), (4, 3), (1000, 20)])
def test_teacher_gets_the_time_of_the_student(student_steps: int, expected: int, models: dict[str, Served]) -> None:
    """The teacher makes the steps that fit into the student's time: at least one, at most the server's limit."""
    timed = {name: Served(name, served.model, served.default_steps) for name, served in models.items()}
    timed["student"].seconds, timed["teacher"].seconds = (0.1, 0.03), (0.05, 0.045)
    body = {"prompt": "", "model": "teacher", "student_steps": student_steps}
    assert client(timed).post("/api/draw", json=body).headers["x-steps"] == str(expected)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"prompt": "x" * 2001}, 422, "prompt: String should have at most 2000 characters"),
        ({"prompt": "a", "steps": 0}, 422, "steps: Input should be greater than or equal to 1"),
        ({"prompt": "a", "steps": 21}, 400, "steps=21: this server draws at most 20: lower steps"),
        ({"prompt": "a", "stepz": 4}, 422, "stepz: Extra inputs are not permitted"),
        ({"prompt": "a", "w": "inf"}, 422, "w: Input should be a finite number"),
        ({"prompt": "a", "size": 63}, 400, "size=63: 63 is not a multiple of the VAE's factor 4: use 60 or 64"),
        ({"prompt": "a", "size": 128}, 400, "size=128: this server draws at most 64 pixels a side: lower size"),
        ({"prompt": "a", "negative": "b"}, 400, "negative='b' has no effect: this model is not guided"),
        ({"prompt": "a", "student_steps": 4}, 400, "student_steps has no effect: it is for a teacher without steps"),
        ({"prompt": "a", "model": "other"}, 422, "model: Input should be 'student' or 'teacher'"),
        ({"prompt": "x" * 70000}, 413, "the request has no length or more than 65536 bytes"),
    ],
    ids=str,
)
def test_wrong_request_is_refused(body: dict[str, Any], status: int, says: str, models: dict[str, Served]) -> None:
    answer = client(models).post("/api/draw", json=body)
    assert (answer.status_code, says in answer.json()["detail"]) == (status, True), answer.text


def test_other_requests_are_refused(models: dict[str, Served]) -> None:
    web = client({"student": models["student"]})
    assert "no teacher is served" in web.post("/api/draw", json={"prompt": "a", "model": "teacher"}).json()["detail"]
    assert web.post("/api/draw", content="{", headers={"Content-Type": "application/json"}).status_code == 422
    assert web.get("/", headers={"Host": "elsewhere.example"}).status_code == 400  # the Host header names another site
    assert web.get("/none").status_code == 404


def test_page_needs_nothing_else(models: dict[str, Served]) -> None:
    answer = client(models).get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "http" not in answer.text.replace("http-equiv", "")


def test_full_queue_is_answered_by_429(models: dict[str, Served], monkeypatch: pytest.MonkeyPatch) -> None:
    """The server draws one request, and two requests wait. It refuses other requests until the queue has room."""
    begun, go, drawn = threading.Event(), threading.Event(), []

    def draw(self: Served, prompt: str, *args: Any) -> torch.Tensor:
        drawn.append(prompt)
        begun.set()
        assert go.wait(60)
        return torch.zeros(3, 8, 8).byte()

    monkeypatch.setattr(Served, "draw", draw)
    with client(models, queue=2) as web:
        answers: dict[int, Any] = {}

        def ask(number: int) -> None:
            answers[number] = web.post("/api/draw", json={"prompt": str(number)})

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        threads[0].start()
        assert begun.wait(60)
        for thread in threads[1:]:
            thread.start()
        for _ in range(600):
            if len(answers) == 3:
                break
            time.sleep(0.1)
        refused = sorted(answers)
        go.set()
        for thread in threads:
            thread.join()
        assert len(refused) == 3
        assert {answers[number].status_code for number in refused} == {429}
        assert answers[refused[0]].json()["detail"] == "2 requests wait already: try again in a moment"
        assert {answers[number].status_code for number in range(6) if number not in refused} == {200}
        assert len(drawn) == 3
        ask(7)
        assert answers[7].status_code == 200
