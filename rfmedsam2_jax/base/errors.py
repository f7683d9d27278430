"""The errors that are meant for the person at the keyboard."""


class UserError(Exception):
  """Something that the user can mend: one line that names the file, what is wrong and what to do.

  Commands print it as `rfmedsam2: <message>` without a traceback and exit with status 2.
  """


class Stopped(Exception):
  """The machine is taken away (SIGTERM), all is saved: commands say so and exit with `RESUME`."""


# Exit status for schedulers that start a run again with --resume: EX_TEMPFAIL of sysexits.h.
RESUME = 75


def printable(text: str) -> str:
  """One line without control characters, which names of files may hold, as Python writes them."""
  return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(error: Exception, limit: int = 200) -> str:
  """What a library said is wrong, or else the kind of its error, in at most `limit` characters."""
  return (str(error).strip().split("\n")[0] or type(error).__name__)[:limit].rstrip(".")
