"""Whether a report may be written; light, so that the command can ask before it loads anything."""

from pathlib import Path

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.files import read_json

MARK = "report.json"  # a folder with it is a report and may be replaced by another


def is_taken(out: Path) -> bool:
  """Whether a report lies there already; UserError if something else does, which must stay."""
  if not out.exists() or (out.is_dir() and not any(out.iterdir())):
    return False
  content = read_json(out / MARK) if (out / MARK).is_file() else None
  made_by = str(content.get("made_by")) if isinstance(content, dict) else ""
  if not made_by.startswith("rfmedsam2 report"):
    raise UserError(f"{out}: exists already and is not a report; choose another folder")
  return True
