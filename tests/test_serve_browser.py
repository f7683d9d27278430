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

from rfmedsam2_jax.data.segmentations import write_segmentation
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


@pytest.mark.slow
def test_a_label_map_is_opened_and_corrected_by_mask_line_and_brush(address, tmp_path):
  pytest.importorskip("SimpleITK")
  volume = load_image(tmp_path / "scans" / "scan.nii.gz")
  labels = np.zeros(volume.geometry.canonical_shape, np.uint8)
  labels[3:9, 17:32, 10:26] = 5
  write_segmentation(tmp_path / "labels.seg.nrrd", labels, volume.geometry, {5: "liver"})
  with browser_page() as (page, wrong):
    page.goto(address)
    page.wait_for_selector("#file option", state="attached")
    page.get_by_role("button", name="Open").click()
    page.wait_for_selector("#view[data-slice='6']")
    page.set_input_files("#ground", tmp_path / "labels.seg.nrrd")
    page.locator("#structures li", has_text="5: liver").wait_for()
    page.locator("#status", has_text="take its mask").wait_for()
    assert colours(page) > 1000
    page.mouse.move(*place(page, 12, 20))
    page.locator("#where", has_text="liver").wait_for()
    value = float(re.search(r"slice 6: (-?[\d.]+), liver", page.locator("#where").inner_text())[1])
    assert value == volume.array[0, 6, 20, 12]
    # A click at the head of the coronal plane goes to the last slice.
    side = page.locator("#sides canvas").first.bounding_box()
    width, height = SHAPE[0] * MM[0], SHAPE[2] * MM[2]
    scale = min(side["width"] / width, side["height"] / height)
    top = side["y"] + (side["height"] - height * scale) / 2
    page.mouse.click(side["x"] + side["width"] / 2, top + 2)
    page.wait_for_selector("#view[data-slice='11']")
    for number in range(10, 5, -1):
      page.keyboard.press("ArrowDown")
      page.wait_for_selector(f"#view[data-slice='{number}']")

    page.keyboard.press("5")
    page.keyboard.press("k")
    page.locator("#prompts li", has_text="5: mask, slice 6").wait_for()
    for number in (7, 8):
      page.keyboard.press("ArrowUp")
      page.wait_for_selector(f"#view[data-slice='{number}']")
    page.keyboard.press("n")
    page.mouse.click(*place(page, 40, 6))
    page.keyboard.press("l")
    drag(page, 12, 20, 20, 20)
    page.keyboard.press("6")
    page.keyboard.press("m")
    page.locator("#radius").fill("0.5")
    page.locator("#view").focus()
    drag(page, 30, 30, 34, 30)
    said = page.locator("#prompts li").all_inner_texts()
    assert said[1:] == ["5: point outside, slice 8 (correction 1)",
                        "5: line inside, slice 8 (correction 1)", "6: mask, slice 8"]
    track(page)
    if os.environ.get("SCREENSHOT"):
      page.screenshot(path=os.environ["SCREENSHOT"])
    with page.expect_download() as download:
      page.keyboard.press("s")
    download.value.save_as(tmp_path / "saved.nii.gz")
    assert wrong == []

  shown, brushed = np.zeros((2, *labels.shape), bool)
  shown[6], brushed[8, 30, 30:35] = labels[6] == 5, True
  points = [(8, 20, x, True) for x in (13, 15, 17, 19)]
  found = PromptedVolume(MODEL, drawn(), volume).track([
    VoxelPrompt(5, mask=shown), VoxelPrompt(6, mask=brushed),
    VoxelPrompt(5, points=((8, 6, 40, False), *points), round=1),
  ])
  saved = np.asarray(nib.load(tmp_path / "saved.nii.gz").dataobj)
  np.testing.assert_array_equal(saved, volume.geometry.to_native(found.labels))
