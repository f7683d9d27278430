"""Where files may lie: on this machine or in a bucket (base.addresses), and words in their stead.

For a checkpoint the word `builtin` may stand, which is no place: the weights of the package; for it
and for a run also the name of what is kept (base.kept)."""

from pathlib import Path

from rfmedsam2_jax.base.kept import is_name

BUILTIN = "builtin"  # as text; a `Path` of this name is a path, and so is the text ./builtin


def word_or_path(text: str) -> str | Path:
  """A checkpoint or a run as a person types it: `builtin` and names as text, else a path.

  A name under which a file or folder lies is that path; `builtin` is always the word.
  """
  named = text == BUILTIN or (is_name(text) and not Path(text).exists())
  return text if named else Path(text)
