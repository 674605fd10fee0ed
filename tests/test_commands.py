"""A reader can copy every documented command into bash and zsh. No unquoted character is special to these shells."""

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
HARMLESS = r"\$\([^()]*\)|\$\{\w+\}|\\$|^[A-Z]=\([^()]*\)|<[\w ]+>|\.\.\.|&&|=\.\.\."  # the reader replaces <...>


def commands(text: str) -> list[str]:
    """Return the lines of code blocks and the code in prose that a reader may paste into a shell."""
    blocks = [
        block for block in re.findall(r"```(?:\w*)\n(.*?)```", text, re.DOTALL) if re.search(rf"^{STARTS}", block, re.MULTILINE)
    ]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return lines + [span for span in spans if re.match(rf"{STARTS}|{OVERRIDE}", span)]


def special(command: str) -> list[str]:
    """Return characters that a shell expands, zsh refuses, or an interactive zsh does not read as a comment."""
    if re.fullmatch(r"# [\w ,.:/+=>@-]*", command):
        return []
    return re.findall(r"[][{}*?!()~#]|(?<!<)[<>](?!>)", re.sub(HARMLESS, "", re.sub(QUOTED, "", command)))


def test_commands_in_docs_are_quoted() -> None:
    assert [(page.name, command) for page in PAGES for command in commands(page.read_text()) if special(command)] == []


def test_commands_in_sources_are_quoted() -> None:
    examples = r"`([^`\n]+)`|^#   (python .*)$"  # code in prose, and examples of a --help page
    spans = [(path.name, a or b) for path in SOURCES for a, b in re.findall(examples, path.read_text(), re.MULTILINE)]
    spans = [(name, span) for name, span in spans if re.match(r"python |sbatch |pip ", span)]
    assert [(name, span) for name, span in spans if special(re.sub(r"\{[\w.]+\}", "", span))] == []


def test_unquoted_character_is_seen() -> None:
    for end in ("w=[0,2]", "~entries.DDIM", "a={b: c}", "a=*.tar", "a=b?", "a # b", "a!"):
        command = f"python x {end}"
        assert special(command)
        assert commands(f"```\n{command}\n```") == [command]
        assert commands(f"see `{command}`") == [command]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_reads_commands_as_bash() -> None:
    lines = {command for page in PAGES for command in commands(page.read_text()) if command.startswith("python ")}
    results = {}
    for shell in ("bash", "zsh"):
        script = "python() { printf '%s\\n' \"$@\"; }\n" + "\n".join(
            re.sub(r"<[\w ]+>", "X", line) for line in sorted(lines) if "$" not in line
        )
        results[shell] = subprocess.run(
            [shell, "-f", "-c", script] if shell == "zsh" else [shell, "-c", script], capture_output=True, text=True
        )
        assert results[shell].stderr == ""
    assert results["bash"].stdout == results["zsh"].stdout


def test_tests_named_in_docs_exist() -> None:
    code = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    text = "\n".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    assert [name for name in re.findall(r"`(test_\w+)(?:\.\.\.)?`", text) if f"def {name}" not in code] == []
