"""A page to try a model: `python -m lcm.serve pipeline=runs/lcd_mini/0/model teacher=mini`."""

from typing import Any

from lcm.app.cli import Program
from lcm.core.numbers import Count, Dtype, Whole

COUNTS: dict[str, Any] = dict.fromkeys(("steps", "teacher_steps", "max_steps", "max_side"), Count)
TEXTS: dict[str, Any] = {"pipeline": str, "teacher": str | None, "host": str}
program = Program("serve", dtype=Dtype, queue=Count, port=Whole, compile=bool, **COUNTS, **TEXTS)
if __name__ == "__main__":
    program.read_command_line()  # before imports that take seconds: --help and misspelt keys are answered at once

import socket

import torch
from omegaconf import DictConfig

from lcm.app.inputs import pick_device
from lcm.app.pipelines import find_pipeline
from lcm.core.errors import UserError
from lcm.models.text_to_image import TextToImage


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. port: 0 takes a free port. Raises UserError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on host={host}, port={port} ({error}): set port=0 for a free one") from None


@program
def main(cfg: DictConfig) -> None:
    """Load the models, measure their speed, and answer until Ctrl-C."""
    try:
        import uvicorn

        from lcm.app.web import Served, make_app
    except ModuleNotFoundError as error:
        raise UserError(f"lcm.serve needs {error.name}: run pip install -e '.[serve]'") from error
    listener = listen(cfg.host, cfg.port)
    options = {"device": pick_device(cfg.device), "dtype": getattr(torch, cfg.dtype), "compile": cfg.compile}
    names = {"student": (cfg.pipeline, cfg.steps), "teacher": (cfg.teacher, cfg.teacher_steps)}
    models = {}
    for role, (name, steps) in names.items():
        if name is None:
            continue
        folder = find_pipeline(name, cfg.paths.runs)
        models[role] = Served(folder, TextToImage.load(folder, **options), steps)
        models[role].model.timesteps(steps)  # raises UserError
        models[role].measure()
        print(f"{role}: {folder}".replace(": ", ":" + " " * (8 - len(role)), 1))
    app = make_app(models, queue=cfg.queue, max_steps=cfg.max_steps, max_side=cfg.max_side, host=cfg.host)
    host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
    print(f"page:    http://{host}:{listener.getsockname()[1]}   (Ctrl-C ends it)", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False)).run(sockets=[listener])


if __name__ == "__main__":
    main()
