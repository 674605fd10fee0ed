"""The page and the HTTP API of `lcm.serve`. Images are drawn one at a time. Further requests wait in a queue."""

import asyncio
import io
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from starlette.middleware.trustedhost import TrustedHostMiddleware

from lcm.app.images import to_pil, write_png
from lcm.core.errors import UserError
from lcm.models.text_to_image import TextToImage

PAGE = Path(__file__).with_name("serve.html")
LONGEST = 2000  # characters of a prompt
LARGEST_BODY = 64 * 1024  # bytes of a request
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Draw(BaseModel):
    """A request for one image.

    student_steps: without `steps`, a teacher gets the steps that fit in the time of so many steps of the student.
    """

    model_config = ConfigDict(extra="forbid")
    prompt: str = Field(max_length=LONGEST)
    model: Literal["student", "teacher"] = "student"
    steps: int | None = Field(None, ge=1)
    student_steps: int | None = Field(None, ge=1)
    w: FiniteFloat | None = None
    seed: int = Field(0, ge=0, lt=2**32)
    negative: str = Field("", max_length=LONGEST)
    size: int | tuple[int, int] | None = None


@dataclass
class Served:
    """A served model. seconds: a and b of the seconds `a + b * steps` for an image, measured at the start."""

    name: str
    model: TextToImage
    default_steps: int
    seconds: tuple[float, float] = (0.0, 0.0)

    def draw(self, prompt: str, steps: int, w: float, seed: int, negative: str, size: tuple[int, int]) -> torch.Tensor:
        """Return an image, uint8 `[3, H, W]`."""
        with torch.inference_mode():
            [images] = self.model.images([prompt], [seed], steps=steps, w=w, negative=negative, size=size)
        return images[0]

    def measure(self) -> None:
        """Time images at two step counts, after a warm-up."""
        times = {}
        few = self.default_steps
        for steps in (few, few, 1) if self.can(1) and few > 1 else (few, few):
            start = time.perf_counter()
            self.draw("", steps, self.model.default_w, 0, "", self.model.size())
            times[steps] = time.perf_counter() - start
        per_step = (times[few] - times[1]) / (few - 1) if len(times) > 1 else times[few] / few
        self.seconds = max(times[few] - per_step * few, 0.0), max(per_step, 1e-6)

    def can(self, steps: int) -> bool:
        """Return whether the model can be sampled in this number of steps."""
        try:
            self.model.timesteps(steps)
        except UserError:
            return False
        return True

    def steps_in(self, seconds: float) -> int:
        """Return the largest number of steps within these seconds, at least 1."""
        fixed, per_step = self.seconds
        return max(1, math.floor((seconds - fixed) / per_step))

    def description(self) -> dict[str, Any]:
        """Return the model's entry in /api/models."""
        names = {"takes_w": self.model.takes_w, "guided": self.model.guided, "w": self.model.default_w}
        return {"name": self.name, "size": self.model.size(), "steps": self.default_steps, **names}


@dataclass
class Queue:
    """Requests, served one at a time in the order of arrival. length: the limit of waiting requests."""

    length: int
    waiting: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self, request: Request, work: Callable[[], Any]) -> Any:
        """Return `work()`, called in a thread. Raises HTTPException 429 if the queue is full, 499 if the client has left."""
        if self.waiting > self.length:
            raise HTTPException(429, f"{self.length} requests wait already: try again in a moment", {"Retry-After": "1"})
        self.waiting += 1
        try:
            async with self.turn:
                if await request.is_disconnected():  # the page sends a new request at every letter
                    raise HTTPException(499, "the client has left")
                return await asyncio.to_thread(work)
        finally:
            self.waiting -= 1


def make_app(models: Mapping[str, Served], *, queue: int, max_steps: int, max_side: int, host: str = "127.0.0.1") -> FastAPI:
    """Return the application. models: the models by role, "student" and "teacher". host: the address of the server."""
    app = FastAPI(title="Latent consistency", docs_url=None, redoc_url=None)  # FastAPI's pages load scripts of other sites
    line = Queue(queue)
    if host in LOOPBACK:  # refuses the host name of another site that resolves to this machine
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]", "testserver"])

    @app.middleware("http")
    async def limit_body(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        length = request.headers.get("content-length", "0" if request.method == "GET" else "")
        if not length.isdigit() or int(length) > LARGEST_BODY:
            return sentence(413, f"the request has no length or more than {LARGEST_BODY} bytes: send a shorter prompt")
        return await call(request)

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part != "body")
        return sentence(422, f"{field or 'the request'}: {first['msg']}")

    @app.exception_handler(UserError)
    async def explain(request: Request, error: UserError) -> Response:
        return sentence(400, str(error))

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(), headers={"Content-Security-Policy": "default-src 'self' 'unsafe-inline' blob:"})

    @app.get("/api/models")
    def describe_models() -> dict[str, Any]:
        limits = {"max_steps": max_steps, "max_side": max_side, "queue": queue}
        return {**{role: served.description() for role, served in models.items()}, "limits": limits}

    @app.post("/api/draw")
    async def draw(wanted: Draw, request: Request) -> Response:
        """Return a PNG. The headers X-Steps and X-Seconds hold its steps and the seconds of its drawing."""
        served = models.get(wanted.model)
        if served is None:
            raise UserError("no teacher is served: start the server with teacher=<pipeline>")
        steps = wanted.steps
        if wanted.student_steps is not None:
            if wanted.model != "teacher" or steps is not None:
                raise UserError("student_steps has no effect: it is for a teacher without steps")
            fixed, per_step = models["student"].seconds
            steps = min(served.steps_in(fixed + per_step * wanted.student_steps), max_steps)
        steps = served.default_steps if steps is None else steps
        if steps > max_steps:
            raise UserError(f"steps={steps}: this server draws at most {max_steps}: lower steps")
        w, size = served.model.default_w if wanted.w is None else wanted.w, served.model.size(wanted.size)
        if max(size) > max_side:
            raise UserError(f"size={wanted.size}: this server draws at most {max_side} pixels a side: lower size")
        settings = {"steps": steps, "w": w, "negative": wanted.negative}
        served.model.check(settings)

        def work() -> tuple[torch.Tensor, float]:
            start = time.perf_counter()
            return served.draw(wanted.prompt, steps, w, wanted.seed, wanted.negative, size), time.perf_counter() - start

        image, seconds = await line.run(request, work)
        settings |= {"prompt": wanted.prompt, "seed": wanted.seed, "size": list(size), "pipeline": served.name}
        settings |= {"sampler": served.model.metadata["sampler"]}
        content = io.BytesIO()
        write_png(to_pil(image), content, **settings)
        headers = {"X-Steps": str(steps), "X-Seconds": f"{seconds:.4f}", "Cache-Control": "no-store"}
        return Response(content.getvalue(), media_type="image/png", headers=headers)

    return app


def sentence(status: int, text: str) -> JSONResponse:
    """Return an error response with one sentence."""
    return JSONResponse({"detail": text}, status_code=status)
