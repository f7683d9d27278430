"""The notebook runs from its first cell to its last: its claims are assertions in its cells."""

from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "functional_experiments.ipynb"


def test_the_notebook_is_valid_and_small_and_holds_no_outputs():
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  nbformat.validate(notebook)
  assert NOTEBOOK.stat().st_size < 50_000
  assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.slow
def test_the_claims_of_the_notebook_hold():
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  client = nbclient.NotebookClient(
    notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
  client.execute()  # raises with the cell and its error
  pictures = [o for cell in notebook.cells for o in cell.get("outputs", ())
              if "image/png" in o.get("data", {})]
  assert len(pictures) == 3
