"""The pages of `rfmedsam2 report` in a real browser, opened as files."""

import base64
import json
import os

import numpy as np
import pytest
from browser import browser_page
from test_report_folder import case_json, save

from rfmedsam2_jax.report import niivue
from rfmedsam2_jax.report.folder import write_report

pytestmark = pytest.mark.skipif(
  niivue.bundle() is None, reason=f"no viewer: {niivue.ADVICE}"
)

# x, y, z; "ball" lies left, in front and high, so that no axis can be mistaken for another.
NAME = "<img src=x onerror=alert(1)>"
SHAPE, BALL = (48, 40, 30), (12, 10, 22)


def ball(radius):
  grid = np.indices(SHAPE) - np.reshape(BALL, (3, 1, 1, 1))
  return ((grid**2).sum(0) <= radius**2).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
  """Two cases of slices along y (coronal): a ball that was found whole, and one half of it."""
  image = np.random.default_rng(0).normal(0, 20, SHAPE) + 200 * ball(6) + 100
  for number, (name, radius) in enumerate((("whole", 6), ("part", 4))):
    save(tmp_path / "pred" / f"{name}.nii.gz", ball(radius))
    save(tmp_path / "pred" / "stage0" / f"{name}.nii.gz", ball(8))
    save(tmp_path / "pred" / "stage1" / f"{name}.nii.gz", ball(radius))
    save(tmp_path / "ref" / f"{name}.nii.gz", ball(6))
    save(tmp_path / "images" / f"{name}.nii.gz", image.astype(np.float32))
    box = [BALL[0] - 6, BALL[2] - 6, BALL[0] + 6, BALL[2] + 6]
    content = case_json(SHAPE, {NAME: (1, box, 0.625)}, ["odd"] * number)
    content["slice_axis"] = 1
    content["structures"][NAME]["boxes"][0]["slice"] = BALL[1]
    (tmp_path / "pred" / f"{name}.json").write_text(json.dumps(content))
  written = write_report(
    tmp_path / "report", None, tmp_path / "pred", tmp_path / "ref", tmp_path / "images"
  )
  return written.index.parent


def opened(page, path):
  page.goto(path.as_uri())
  page.wait_for_selector("body[data-ready]", timeout=60_000)


def pixels(page):
  """The canvas as it is seen, int [H, W, 3]."""
  width, packed = page.evaluate("""() => {
    const gl = viewer.gl, w = gl.drawingBufferWidth, h = gl.drawingBufferHeight;
    const out = new Uint8Array(4 * w * h);
    viewer.drawScene();
    gl.readPixels(0, 0, w, h, gl.RGBA, gl.UNSIGNED_BYTE, out);
    let text = "";
    for (let i = 0; i < out.length; i += 8192) {
      text += String.fromCharCode(...out.subarray(i, i + 8192));
    }
    return [w, btoa(text)];
  }""")
  flat = np.frombuffer(base64.b64decode(packed), np.uint8)
  return flat.reshape(-1, width, 4)[:, :, :3].astype(int)


def red(picture):
  """Pixels in the colour of the first structure."""
  return int((picture[..., 0] - picture[..., 1:].max(-1) > 40).sum())


def switch(page, layer):
  page.locator(f"input[data-layer='{layer}']").click()
  return pixels(page)


@pytest.mark.slow
def test_a_volume_is_seen_and_every_layer_is_switched(folder):
  with browser_page(900, 700) as (page, wrong):
    opened(page, next(folder.glob("cases/*-whole.html")))
    page.get_by_role("radio", name="Coronal").click()
    first = pixels(page)
    assert len(np.unique(first)) > 50 and red(first) > 500
    layers = page.eval_on_selector_all("[data-layer]", "all => all.map(one => one.dataset.layer)")
    assert layers == [
      "image", "prediction (stage 1)", "reference", "generator", "boxes", "predicted IoU"
    ]
    bare = switch(page, layers[1])
    assert red(bare) == 0 and len(np.unique(bare)) > 50
    seen = {}
    for layer in layers[2:]:
      seen[layer] = switch(page, layer)
      assert (seen[layer] != bare).any(), layer
      np.testing.assert_array_equal(switch(page, layer), bare)
    # The outline is less than the whole, and the generator's ball is larger than both.
    assert 0 < red(seen["reference"]) < red(first) < red(seen["generator"])
    page.locator("#outline").click()
    assert red(switch(page, "reference")) > red(seen["reference"])
    switch(page, "reference")
    # The crosshair and the letters of the directions stay.
    assert (switch(page, "image") > 0).mean() < 0.05 < (bare > 0).mean()
    # What was said of the slice under the crosshair: the ball's, as the viewer begins there.
    said = page.locator("#readout").inner_text()
    assert f"coronal slice {BALL[1]}" in said and "0.625" in said and NAME in said
    if os.environ.get("SCREENSHOT"):
      page.screenshot(path=os.environ["SCREENSHOT"])
    assert wrong == []


@pytest.mark.slow
def test_tables_sort_and_lead_to_the_cases(folder):
  with browser_page(900, 700) as (page, wrong):
    page.goto((folder / "index.html").as_uri())
    names = "rows => rows.map(row => row.cells[0].textContent)"
    rows = "#case-table tbody tr"
    assert page.eval_on_selector_all(rows, names) == ["part", "whole"]  # the worst first
    head = page.locator("#case-table th", has_text="Dice").get_by_role("button")
    head.click()
    assert page.eval_on_selector_all(rows, names) == ["whole", "part"]
    head.click()
    assert page.eval_on_selector_all(rows, names) == ["part", "whole"]
    page.locator("input.filter").fill("whole")
    assert page.locator("#all tbody tr:visible").count() == 1
    page.locator(rows).first.get_by_role("link").click()
    page.wait_for_selector("body[data-ready]", timeout=60_000)
    assert page.locator("h1").inner_text() == "part"
    assert page.locator("section.warnings").inner_text().endswith("odd")
    assert wrong == []
