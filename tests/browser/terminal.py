"""Pictures of the command in a terminal: python -m tests.browser.terminal writes docs/images/terminal-*.svg.

Every command runs in a pseudo-terminal of its own. What a terminal would show at the end is drawn by Rich; of what is
taken back (a bar's frames) only the last counts.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import tempfile
import termios
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
CALIBRATION = "--calib-data builtin --calib-samples 64 --calib-seqlen 256"
COMMANDS = {
    "plan": f"quark plan --model demo --scheme nvfp4 --algorithm gptq {CALIBRATION}",
    "quantize": f"quark quantize --model demo --scheme nvfp4 --algorithm gptq {CALIBRATION} --eval -o out --overwrite",
    "report": "quark report out",
}
COLUMNS = (80, 120)
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_MOVE = re.compile(r"\x1b\[(\?)?([\d;]*)([A-Za-ln-z])|\x1b\].*?(?:\x07|\x1b\\)|\r|\n|\x1b[()][A-Z0-9]|\x08")


def recorded(command: str, columns: int, folder: Path) -> str:
    """All that a command writes to a terminal."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        names = {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "60", "PYTHONUNBUFFERED": "1"}
        os.environ.update(names)
        for name in ("NO_COLOR", "CI", "GITHUB_ACTIONS"):
            os.environ.pop(name, None)
        os.execvp(sys.executable, [sys.executable, "-m", "quarkcli", *command.split()[1:]])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 60, columns, 0, 0))
    content = bytearray()
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        content += piece
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise SystemExit(f"{command}: exit {code}\n{content.decode(errors='replace')}")
    return content.decode("utf-8", "replace").replace(str(ROOT), "~/quark")


def screen(content: str) -> list[str]:
    """The lines that stay, with their colours: line ends, returns, cursor up and erasing are followed."""
    lines, row = [""], 0
    place = 0
    while place < len(content):
        found = _MOVE.search(content, place)
        lines[row] += content[place : found.start() if found else len(content)]
        if found is None:
            break
        place = found.end()
        count = int(found[2].split(";")[0]) if found[2] and found[2][0].isdigit() else 1
        if found[0] == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
        elif found[0] == "\r":
            if content[place : place + 1] != "\n":
                lines[row] = ""  # what comes next is written over it
        elif found[3] == "A":
            row = max(0, row - count)
        elif found[3] == "K":
            lines[row] = ""
        elif found[3] == "J":
            del lines[row + 1 :]
            lines[row] = ""
    while lines and not _COLOUR.sub("", lines[-1]).strip():
        lines.pop()
    return lines


def drawn(command: str, lines: list[str], columns: int) -> str:
    """The picture."""
    console = Console(record=True, width=columns, file=StringIO(), color_system="truecolor", force_terminal=True)
    words, shown = command.split(), [""]
    for word in words:
        if len(shown[-1]) + len(word) > columns - 6:
            shown[-1] += " \\"
            shown.append("   ")
        shown[-1] += f" {word}" if shown[-1] else f"$ {word}"
    for line in shown:
        console.print(Text(line, style="bold"), no_wrap=True, overflow="ignore", crop=False)
    for line in lines:
        console.print(Text.from_ansi(line), no_wrap=True, overflow="ignore", crop=False)
    return console.export_svg(title=" ".join(words[:2]), theme=MONOKAI, unique_id=f"{words[1]}-{columns}")


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for columns in COLUMNS:
            for name, command in COMMANDS.items():
                lines = screen(recorded(command, columns, Path(temporary)))
                wide = [line for line in lines if len(_COLOUR.sub("", line)) > columns]
                if wide:
                    sys.exit(f"{command}: wider than {columns} columns: {wide[0]}")
                path = IMAGES / f"terminal-{name}-{columns}.svg"
                path.write_text(drawn(command, lines, columns), encoding="utf-8")
                print(path)


if __name__ == "__main__":
    main()
