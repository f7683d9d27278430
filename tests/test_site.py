"""The site of the documentation builds without a warning and has what a reader looks for."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
  for name in ("sphinx", "myst_parser", "furo"):
    pytest.importorskip(name, reason="the site needs pip install -e '.[docs]'")
  # From a copy: the pages of the reference are written beside the sources.
  ignored = shutil.ignore_patterns("_build", "_api")
  shutil.copytree(DOCS, tmp_path / "clone" / "docs", ignore=ignored)
  (tmp_path / "clone" / "rfmedsam2_jax").symlink_to(DOCS.parent / "rfmedsam2_jax")
  command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
  done = subprocess.run(
    [*command, str(tmp_path / "clone" / "docs"), str(tmp_path / "html")],
    capture_output=True, text=True,
  )
  assert done.returncode == 0, done.stderr
  for page in DOCS.rglob("*.md"):
    if not {"_build", "_api"} & set(page.parts):
      built = (tmp_path / "html" / page.relative_to(DOCS)).with_suffix(".html")
      assert built.is_file(), f"{page} is in no toctree of docs/index.md"
  api = (tmp_path / "html" / "_api" / "rfmedsam2_jax.segmentation.predict.html").read_text("utf-8")
  assert "Label map uint8 or uint16 [D, H, W]" in api
