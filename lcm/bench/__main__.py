"""Measurements on this machine, each a table: `python -m lcm.bench 'parts=[data,soak,step,sampling]'`."""

import json
import shlex
import sys
import time
from dataclasses import asdict

import lightning  # noqa: F401  before `program` quiets it: it raises its voice when it is imported
from omegaconf import DictConfig

from lcm.app.cli import build, program
from lcm.app.inputs import output_folder
from lcm.bench.measure import machine
from lcm.core.errors import UserError
from lcm.core.numbers import Count
from lcm.runtime.redaction import redacted


@program("bench", parts=str | list[str], output=str, pipeline=str, resolution=Count)
def main(cfg: DictConfig) -> None:
    """Run the parts one after the other; each prints its table and writes <part>.md and <part>.json."""
    if isinstance(cfg.parts, str):
        raise UserError(f"parts={cfg.parts} is no list: write parts=[{cfg.parts}]")
    if unknown := set(cfg.parts) - set(cfg.part):
        raise UserError(f"parts={unknown.pop()} is not measured: choose among {', '.join(cfg.part)}")
    folder = output_folder(cfg.output)
    for made in (cfg.dataset, cfg.untrained):
        if made is not None:
            build(made)()
    for name in cfg.parts:
        started = time.monotonic()
        table = build(cfg.part[name])()
        command = shlex.join(
            ["python", "-m", "lcm.bench", f"parts=[{name}]", *(redacted(a) for a in sys.argv[1:] if "parts=" not in a)]
        )
        seconds, facts = round(time.monotonic() - started), machine()
        where = ", ".join(f"{key} {value}" for key, value in facts.items())
        text = f"{table.markdown()}\n`{command}`: {seconds} s; {where}.\n"
        (folder / f"{name}.md").write_text(text)
        record = {**asdict(table), "command": command, "seconds": seconds, "machine": facts}
        (folder / f"{name}.json").write_text(json.dumps(record, indent=2))
        print(f"{text}\ntable:   {folder / name}.md\n", flush=True)


if __name__ == "__main__":
    main()
