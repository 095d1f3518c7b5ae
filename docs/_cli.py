"""Writes cli.md, the reference of the command line, from what `--help` prints: python docs/_cli.py

A test compares the page with the options; `make help-pages` writes it again.
"""

import contextlib
import io
import re
from pathlib import Path

from bco_fast import cli

PAGE = Path(__file__).with_name("cli.md")
PARTS = {"cache": ("build", "inspect", "verify", "export", "prune")}
"""Commands that have commands of their own."""
HEAD = """# Command line

Every command with its options, as `bco-fast COMMAND --help` prints them. Dashes and underscores in options are the same.
`--help-all` of `train`, `online` and `reward` adds every other option of `transformers.TrainingArguments`. The last line that
a command prints is JSON; the exit code is 0, 2 for what the user can fix, 3 for a run that diverged, 130 for Ctrl-C and 143 for
SIGTERM.
"""


def page() -> str:
    parts = [HEAD]
    for name, (usage, about) in cli.COMMANDS.items():
        parts.append(f"## `bco-fast {name}`\n\n{about[:1].upper()}{about[1:]}.\n\n```\nbco-fast {name} {usage}\n```\n")
        for words in [(name, part) for part in PARTS[name]] if name in PARTS else [(name,)]:
            if len(words) > 1:
                parts.append(f"### `bco-fast {' '.join(words)}`\n")
            parts.extend(_tables(_help(words), "####" if len(words) > 1 else "###"))
    return "\n".join(parts)


def _help(words: tuple[str, ...]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
    return out.getvalue()


def _tables(text: str, mark: str):
    """Markdown tables of the sections of a help text; the usage is in the heading's block already."""
    for title, body in re.findall(r"^(\S[^\n]*):\n((?:  [^\n]*\n?)+)", text, flags=re.MULTILINE):
        options: list[list[str]] = []
        for line in body.splitlines():
            if re.match(r"  \S", line):  # an option, and on the same line or below its text
                words, _, about = line.strip().partition("  ")
                options.append([words, about.strip()])
            elif options:
                options[-1][1] = f"{options[-1][1]} {line.strip()}".strip()
        options = [option for option in options if not option[0].startswith("-h")]
        if not options or title.startswith("usage"):
            continue
        if title not in ("options", "positional arguments"):
            yield f"{mark} {title[:1].upper()}{title[1:]}\n"
        rows = [f"| `{_cell(words)}` | {_cell(about)} |" for words, about in options]
        yield "\n".join(["| option | meaning |", "|---|---|", *rows, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
