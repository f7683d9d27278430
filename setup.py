"""Everything about the package is in pyproject.toml; this adds what a build fetches."""

import importlib.util
import sys
import warnings
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

_spec = importlib.util.spec_from_file_location(
  "niivue", Path(__file__).parent / "rfmedsam2_jax" / "report" / "niivue.py"
)
niivue = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(niivue)


# Said of every editable installation, whatever is in the folder, and pip shows it.
warnings.filterwarnings("ignore", "Editable installation", UserWarning)


class BuildWithViewer(build_py):
  """Fetches the viewer of `rfmedsam2 report` first; without a network the package lacks it."""

  def run(self):
    try:
      niivue.fetch()
    except (OSError, ValueError) as error:
      print(f"warning: built without NiiVue ({error}); later: {niivue.ADVICE}", file=sys.stderr)
    super().run()


setup(cmdclass={"build_py": BuildWithViewer})
