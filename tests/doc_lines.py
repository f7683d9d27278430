"""What the documents tell a reader to type: blocks of code and commands within the text."""

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
  ROOT / "README.md", ROOT / "CONTRIBUTING.md",
  *sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts),
]
# Languages of blocks that a shell reads. A block of `text` is output or a drawing.
SHELL = ("", "bash", "sh", "shell", "console")
# A span of text that begins with one of these is a command.
PROGRAMS = (
  "rfmedsam2", "python", "python3", "pytest", "make", "pip", "srun", "mpirun", "gcloud",
  "tensorboard", "scontrol", "git", "curl", "docker", "uv", "sphinx-build", "jupyter", "export",
)


@dataclasses.dataclass(frozen=True)
class Block:
  """`text` of a page from line `line` on; `inline` if it stood between single backticks."""

  page: str
  line: int
  language: str
  text: str
  inline: bool = False

  @property
  def place(self) -> str:
    return f"{self.page}:{self.line}"


def blocks_of(path: Path) -> Iterator[Block]:
  page, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")

  def line_of(position: int) -> int:
    return text.count("\n", 0, position) + 1

  fence = re.compile(r"^( *)(`{3,}|~{3,}) *([^\s`]*)[^\n]*\n(.*?)^\1\2 *$", re.M | re.S)
  for match in fence.finditer(text):
    language = match[3].strip("{}")
    yield Block(page, line_of(match.start()) + 1, language, match[4])
  # Fences are blanked, so that lines keep their numbers.
  rest = fence.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
  for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", rest):
    command = " ".join(match[1].split())
    if command.split(" ")[0] in PROGRAMS:
      yield Block(page, line_of(match.start()), "", command, inline=True)


def commands_of(text: str) -> Iterator[list[str]]:
  """The simple commands of a shell's text, in order, as words.

  Lines that end in a backslash or within quotes are joined; `&&`, `||`, `;` and `|` divide.
  """
  pending = ""
  for line in text.split("\n"):
    pending += line
    if pending.endswith("\\"):
      pending = pending[:-1] + " "
      continue
    try:
      shlex.split(pending, comments=True)
    except ValueError:  # an open quotation
      pending += "\n"
      continue
    lexer = shlex.shlex(pending, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
      if set(word) <= set("&|;"):
        yield words
        words = []
      else:
        words.append(word)
    if words:
      yield words
    pending = ""
  assert not pending.strip(), f"this ends within a command: {pending}"
