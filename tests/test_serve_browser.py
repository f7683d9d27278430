"""The page of `rfmedsam2 serve` as a person uses it, in a real browser."""

import json
import os
import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from browser import browser_page
from small_sam2 import MODEL, SMALL, drawn

from rfmedsam2_jax.data.volumes import load_image
from rfmedsam2_jax.prompted.slice_frame import VoxelPrompt
from rfmedsam2_jax.prompted.tracked import PromptedVolume
from rfmedsam2_jax.weights.checkpoint import save_checkpoint

pytest.importorskip("fastapi", reason="pip install 'rfmedsam2-jax[serve]'")

SHAPE = (48, 40, 12)  # x, y, z
MM = (2.0, 2.5, 4.0)


@pytest.fixture
def address(tmp_path):
  (tmp_path / "scans").mkdir()
  rng = np.random.default_rng(0)
  voxels = rng.normal(0, 20, SHAPE)
  voxels[10:26, 8:22, 2:10] += 200
  image = nib.Nifti1Image(voxels.astype(np.int16), np.diag([-MM[0], MM[1], MM[2], 1.0]))
  nib.save(image, tmp_path / "scans" / "scan.nii.gz")
  save_checkpoint(tmp_path / "small", SMALL, drawn(), {"source": "drawn"})
  process = subprocess.Popen(
    [sys.executable, "-m", "rfmedsam2_jax", "serve", str(tmp_path / "small"), "--json",
     "--port", "0", "--folder", str(tmp_path / "scans")],
    stdout=subprocess.PIPE, text=True,
  )
  try:
    yield json.loads(process.stdout.readline())["result"]["address"]
  finally:
    process.kill()
    process.wait()


def place(page, x, y):
  """Where voxel (x, y) of an axial slice lies on the page."""
  box = page.locator("#view").bounding_box()
  width, height = SHAPE[0] * MM[0], SHAPE[1] * MM[1]
  scale = min(box["width"] / width, box["height"] / height)
  left = box["x"] + (box["width"] - width * scale) / 2
  top = box["y"] + (box["height"] - height * scale) / 2
  return left + (x + 0.5) * MM[0] * scale, top + (y + 0.5) * MM[1] * scale


def drag(page, x0, y0, x1, y1):
  page.mouse.move(*place(page, x0, y0))
  page.mouse.down()
  page.mouse.move(*place(page, x1, y1), steps=3)
  page.mouse.up()


def track(page):
  page.keyboard.press("t")
  page.locator("#status", has_text=re.compile("^tracked")).wait_for(timeout=120_000)
  page.wait_for_selector("#track:not([disabled])")
  found = re.search(r"in ([\d.]+) s", page.locator("#status").inner_text())
  page.evaluate("document.getElementById('status').textContent = ''")
  return float(found[1])


def colours(page):
  """How many pixels of the canvas are not grey."""
  return page.evaluate("""() => {
    const c = document.getElementById('view');
    const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
    let n = 0;
    for (let i = 0; i < d.length; i += 4) n += d[i] !== d[i + 1] || d[i] !== d[i + 2];
    return n;
  }""")


@pytest.mark.slow
def test_a_person_prompts_tracks_corrects_and_saves_what_track_gives(address, tmp_path):
  with browser_page() as (page, wrong):
    page.goto(address)
    page.wait_for_selector("#file option", state="attached")
    page.get_by_role("button", name="Open").click()
    page.wait_for_selector("#view[data-slice='6']")
    assert colours(page) == 0
    page.keyboard.press("3")
    drag(page, 9, 17, 26, 32)
    page.wait_for_selector("#prompts li")
    first = track(page)
    page.keyboard.press("ArrowUp")
    page.wait_for_selector("#view[data-slice='7']")
    assert colours(page) > 1000  # the overlay; no prompt is on this slice
    page.keyboard.press("ArrowUp")
    page.wait_for_selector("#view[data-slice='8']")
    page.keyboard.press("n")
    page.mouse.click(*place(page, 40, 6))
    second = track(page)
    if os.environ.get("SCREENSHOT"):
      page.screenshot(path=os.environ["SCREENSHOT"])
    with page.expect_download() as download:
      page.keyboard.press("s")
    assert download.value.suggested_filename == "scan_labels.nii.gz"
    download.value.save_as(tmp_path / "saved.nii.gz")
    assert wrong == []
  print(f"first tracking {first} s, correction {second} s")

  image, saved = nib.load(tmp_path / "scans" / "scan.nii.gz"), nib.load(tmp_path / "saved.nii.gz")
  np.testing.assert_array_equal(saved.affine, image.affine)
  volume = load_image(tmp_path / "scans" / "scan.nii.gz")
  found = PromptedVolume(MODEL, drawn(), volume).track([
    VoxelPrompt(3, box=((6, 17, 9), (6, 32, 26))),
    VoxelPrompt(3, points=((8, 6, 40, False),), round=1),
  ])
  labels = np.asarray(saved.dataobj)
  assert set(np.unique(labels)) == {0, 3}
  np.testing.assert_array_equal(labels, volume.geometry.to_native(found.labels))
