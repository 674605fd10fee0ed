"""The page that `--help` prints. Its text is in conf/<program>.yaml and in the comments of the keys.

The comment at the head of conf/<program>.yaml describes the program and gives examples (indented lines). Its line
`Keys of parts: ...` names the most important keys of parts. Top-level keys with a comment are listed, too.
"""

import re
import textwrap
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lcm.app.groups import Groups
from lcm.app.targets import CONF

KEYS_OF_PARTS = "Keys of parts: "


def page(program: str, cfg: DictConfig) -> str:
    """Return the page of a program. cfg: its configuration, with Hydra's own keys (`hydra`)."""
    head = head_of(program)
    names = [line.removeprefix(KEYS_OF_PARTS).split() for line in head if line.startswith(KEYS_OF_PARTS)]
    purpose = [line for line in head if line and not line.startswith((" ", KEYS_OF_PARTS))]
    keys = {name: text for name, text in comments_in(CONF / f"{program}.yaml").items() if "." not in name}
    keys |= {name: comment_of(name, program) for part in names for name in part}
    groups = choices(program, cfg)
    return "\n".join(
        [
            *purpose,
            "\nExamples:",
            *examples(program),
            "\nKeys, set with <key>=<value>:",
            *(entry(f"{key}={short(cfg, key)}", text) for key, text in keys.items()),
            *["\nGroups, set with <group>=<option> (the first is the default; + adds a part):"] * bool(groups),
            *(entry(group, ", ".join(options)) for group, options in groups.items()),
            "\n--cfg job prints the whole configuration. docs/guide.md explains it.",
        ]
    )


def head_of(program: str) -> list[str]:
    """Return the comment at the head of a program's yaml."""
    text = (CONF / f"{program}.yaml").read_text()
    return [line[2:].rstrip() for line in re.match(r"(?:#.*\n)*", text)[0].splitlines()]  # type: ignore[index]


def examples(program: str) -> list[str]:
    return [line for line in head_of(program) if line.startswith(" ")]


def comments_in(file: Path) -> dict[str, str]:
    """Return the comments of a yaml file by dotted key."""
    comments: dict[str, str] = {}
    path: list[str] = []
    for line in file.read_text().splitlines():
        if match := re.match(r"((?:  )*)(\w+):(?:[^#]|\S#)*(?:\s# (.*))?$", line):
            path = [*path[: len(match[1]) // 2], match[2]]
            comments[".".join(path)] = match[3]
    return {key: comment for key, comment in comments.items() if comment}


def comment_of(key: str, program: str) -> str:
    """Return the comment of a part's key in the program's file, else in the first file of its group that has one, else ""."""
    if comment := comments_in(CONF / f"{program}.yaml").get(key):
        return comment
    names = key.split(".")
    for depth in range(len(names) - 1, 0, -1):
        for file in sorted((CONF / "/".join(names[:depth])).glob("*.yaml")):
            if comment := comments_in(file).get(".".join(names[depth:])):
                return comment
    return ""


def choices(program: str, cfg: DictConfig) -> dict[str, list[str]]:
    """Return the groups and their options. The default is first, or "(none)". A group that can be added has a plus."""
    groups, chosen = Groups(program), dict(cfg.hydra.runtime.choices)
    others = [name for name in groups.names if name not in chosen and name.rpartition("/")[0] in chosen]
    rows = {}
    for name, option in {**chosen, **{f"+{name}": None for name in others}}.items():
        options = groups.options(name.lstrip("+"))
        if not name.startswith(("hydra", "/")) and len(options) > 1 - (option is None):
            nothing = ["(none)"] if option is None and not name.startswith("+") else []
            rows[name] = nothing + sorted(options, key=lambda other: other != option)
    return dict(sorted(rows.items(), key=lambda row: row[0].lstrip("+")))


def short(cfg: DictConfig, key: str) -> str:
    """Return a key's value as a user types it, shortened."""
    parent = OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else cfg
    node = parent._get_node(key.rpartition(".")[2])
    value = str(node._value()) if node is not None else "..."
    text = {"None": "null", "True": "true", "False": "false", "???": "..."}.get(value, value)
    return text if len(text) <= 40 and not OmegaConf.is_config(node) else "[...]" if OmegaConf.is_list(node) else "..."


def entry(head: str, text: str) -> str:
    lines = textwrap.wrap(text, 84)
    if len(head) > 30:
        lines.insert(0, "")
    return "\n".join(f"  {head if not number else '':<32}{line}".rstrip() for number, line in enumerate(lines))
