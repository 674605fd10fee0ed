"""Benchmarks of this machine, one table for each part: `python -m lcm.bench 'parts=[data,step,sampling]'`."""

from lcm.app.cli import Program, build
from lcm.core.numbers import Count

program = Program("bench", parts=str | list[str], output=str, pipeline=str, resolution=Count)
if __name__ == "__main__":
    program.read_command_line()  # before imports that take seconds: --help and misspelt keys are answered at once

import json
import shlex
import sys
import time

import lightning  # noqa: F401  before `program` sets its log level, which this import resets
from omegaconf import DictConfig

from lcm.app.inputs import output_folder
from lcm.bench.measure import machine
from lcm.core.errors import UserError
from lcm.runtime.redaction import redacted


@program
def main(cfg: DictConfig) -> None:
    """Run the parts one after the other. Each prints its table and writes <part>.md and <part>.json."""
    if isinstance(cfg.parts, str):
        raise UserError(f"parts={cfg.parts} is not a list: write parts=[{cfg.parts}]")
    if unknown := set(cfg.parts) - set(cfg.part):
        raise UserError(f"parts={unknown.pop()} does not exist: choose among {', '.join(cfg.part)}")
    folder = output_folder(cfg.output)
    for maker in (cfg.dataset, cfg.untrained):
        if maker is not None:
            build(maker)()
    for name in cfg.parts:
        started = time.monotonic()
        table = build(cfg.part[name])()
        overrides = [redacted(arg) for arg in sys.argv[1:] if "parts=" not in arg]
        if table.picture is not None:
            table.picture.save(folder / f"{name}.png")
        record = {
            "title": table.title,
            "rows": table.rows,
            "note": table.note,
            "command": shlex.join(["python", "-m", "lcm.bench", f"parts=[{name}]", *overrides]),
            "seconds": round(time.monotonic() - started),
            "machine": machine(),
        }
        machine_text = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
        text = f"{table.markdown()}\n`{record['command']}`: {record['seconds']} s; {machine_text}.\n"
        (folder / f"{name}.md").write_text(text)
        (folder / f"{name}.json").write_text(json.dumps(record, indent=2))
        print(f"{text}\ntable:   {folder / name}.md\n", flush=True)


if __name__ == "__main__":
    main()
