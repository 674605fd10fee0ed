"""Every documented command can be copied into bash and zsh: nothing in it means something to a shell that it should not."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "lcm/assets/mini/README.md"]
SOURCES = [
    *sorted((ROOT / "lcm").rglob("*.py")),
    *ROOT.glob("*.py"),
    *sorted((ROOT / "conf").rglob("*.yaml")),
    ROOT / "Makefile",
]
STARTS = r"(?:(?:[A-Z_]+=\S+ )*(?:python3?|make|sbatch|srun|torchrun|pip|tar|docker|enroot|pytest|for) |\w+/bin/\w+ |[A-Z]=\()"
OVERRIDE = r"[\"']?[+~]{0,2}[a-z][\w./@-]*=\S"
QUOTED = r"'[^']*'|\"(?:\\.|[^\"\\])*\""
HARMLESS = r"\$\([^()]*\)|\$\{\w+\}|\\$|^[A-Z]=\([^()]*\)|<[\w ]+>|\.\.\.|&&|=\.\.\."  # <...> is to be filled in


def commands(text: str) -> list[str]:
    """The lines of code blocks and the code in prose that a reader may paste into a shell."""
    blocks = [
        block for block in re.findall(r"```(?:\w*)\n(.*?)```", text, re.DOTALL) if re.search(rf"^{STARTS}", block, re.MULTILINE)
    ]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return lines + [span for span in spans if re.match(rf"{STARTS}|{OVERRIDE}", span)]


def special(command: str) -> list[str]:
    """What a shell would expand, or zsh refuse, or an interactive zsh not take for a comment."""
    if re.fullmatch(r"# [\w ,.:/+=>@-]*", command):
        return []
    return re.findall(r"[][{}*?!()~#]|(?<!<)[<>](?!>)", re.sub(HARMLESS, "", re.sub(QUOTED, "", command)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_are_quoted_for_bash_and_zsh(page: Path) -> None:
    found = [command for command in commands(page.read_text()) if special(command)]
    assert not found


def test_commands_in_docstrings_comments_and_messages_are_quoted_too() -> None:
    found = [
        (path.name, span)
        for path in SOURCES
        for span in re.findall(r"`([^`\n]+)`", path.read_text())
        if re.match(r"python |sbatch |pip ", span) and special(re.sub(r"\{[\w.]+\}", "", span))
    ]
    assert not found


@pytest.mark.parametrize(
    "command",
    [
        "python x w=[0,2]",
        "python x ~entries.DDIM",
        "python x a={b: c}",
        "python x a=*.tar",
        "python x a=b?",
        "python x a # b",
        "python x a!",
    ],
)
def test_an_unquoted_character_is_seen(command: str) -> None:
    assert special(command)
    assert commands(f"```\n{command}\n```") == [command]
    assert commands(f"see `{command}`") == [command]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_hands_every_documented_override_on_as_bash_does() -> None:
    lines = {command for page in PAGES for command in commands(page.read_text()) if command.startswith("python ")}
    said = {}
    for shell in ("bash", "zsh"):
        script = "python() { printf '%s\\n' \"$@\"; }\n" + "\n".join(
            re.sub(r"<[\w ]+>", "X", line) for line in sorted(lines) if "$" not in line
        )
        said[shell] = subprocess.run(
            [shell, "-f", "-c", script] if shell == "zsh" else [shell, "-c", script], capture_output=True, text=True
        )
        assert said[shell].stderr == ""
    assert said["bash"].stdout == said["zsh"].stdout
