"""How long the page of `rfmedsam2 serve` waits: first tracking, correction, another box.

python benchmarks/serve.py CHECKPOINT CT.nii.gz [--image-size 512] [--repeats 3]

Starts the command and asks it over HTTP as the page does. Every repeat opens the volume anew. The
first one also compiles and is printed apart; of the others medians are given.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("checkpoint")
  parser.add_argument("image", type=Path)
  parser.add_argument("--image-size", default="512")
  parser.add_argument("--repeats", type=int, default=3)
  options = parser.parse_args()
  process = subprocess.Popen(
    [sys.executable, "-m", "rfmedsam2_jax", "serve", options.checkpoint, "--json", "--port", "0",
     "--folder", str(options.image.parent), "--image-size", options.image_size],
    stdout=subprocess.PIPE, text=True,
  )
  try:
    assert process.stdout
    site, token = json.loads(process.stdout.readline())["result"]["address"].split("#")
    rounds = [session(site, token, options.image.name) for _ in range(options.repeats + 1)]
  finally:
    process.kill()
  print("seconds until the prompted slice is there, and all slices\n"
        f"{'':32} {'compiling':>15} {'median':>15}")
  for what, compiling in rounds[0].items():
    median = [statistics.median(r[what][i] for r in rounds[1:]) for i in (0, 1)]
    print(f"{what:32} " + " ".join(f"{a:7.2f} {b:7.2f}" for a, b in (compiling, median)))


def session(site: str, token: str, name: str) -> dict[str, tuple[float, float]]:
  """Opens the volume and does what a person does.

  Returns:
    seconds until the prompted slice was there, and until all were.
  """
  def ask(path: str, value: dict | None = None) -> dict:
    request = urllib.request.Request(
      f"{site}api/v1/{path}", json.dumps(value).encode() if value else None,
      {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
      return json.load(answer)

  def wait(what: str) -> None:
    began, shown = time.monotonic(), 0.0
    job = ask(f"volumes/{volume['volume']}/track", {"prompts": prompts, "space": "zyx"})
    key = job["job"]
    while job["state"] in ("queued", "running"):
      time.sleep(0.01)
      job = ask(f"jobs/{key}")
      shown = shown or (time.monotonic() - began if job["fresh"] else 0.0)
    if job["state"] != "done":
      raise SystemExit(f"{job['state']}: {job['error']}")
    seconds[what] = shown, time.monotonic() - began

  volume = ask("volumes", {"file": name, "window": "soft-tissue"})
  depth, height, width = volume["slices"], volume["rows"], volume["columns"]
  middle = depth // 2

  def box(label: int, number: int, left: float, which: int = 0) -> dict:
    corners = [(number, height * f, width * (left + g)) for f, g in ((0.3, 0.0), (0.6, 0.3))]
    return {"label": label, "round": which, "box": corners}

  def point(label: int, number: int, which: int) -> dict:
    return {"label": label, "round": which,
            "points": [(number, height * 0.45, width * 0.3, True)]}

  seconds: dict[str, tuple[float, float]] = {}
  prompts = [box(1, middle, 0.15)]
  wait("first tracking, encodes")
  prompts.append(point(1, middle + depth // 4, 1))
  wait("correction on another slice")
  prompts.append(point(1, middle - depth // 4, 2))
  wait("correction on a third slice")
  prompts.append(box(2, middle + 2, 0.55, 3))
  wait("a box of a new label")
  prompts.pop()
  wait("undo")
  return seconds


if __name__ == "__main__":
  main()
