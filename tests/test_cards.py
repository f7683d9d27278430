"""The model card and the data statement say what the run's files say; templates have their form."""

import json
import re
from pathlib import Path
from statistics import mean, median, stdev

import jax
import nibabel as nib
import numpy as np
import pytest

from rfmedsam2_jax.config import load_config
from rfmedsam2_jax.data.plan import load_plan
from rfmedsam2_jax.model import generator_network
from rfmedsam2_jax.nn import init
from rfmedsam2_jax.nn.initialisation import init_generator

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RUN = DOCS / "hippocampus"
VOLUMES = ROOT.parent / "shared" / "data" / "Task04_Hippocampus"
PAGES = ("model_card", "data_statement")
CARD, STATEMENT = ((DOCS / f"{name}.md").read_text("utf-8") for name in PAGES)


def read(name):
  return json.loads((RUN / name).read_text("utf-8"))


def rows(text):
  """Cells of the table rows of a page, by the first one."""
  cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()
           if line.startswith("|")]
  return {row[0]: row[1:] for row in cells}


@pytest.mark.parametrize("name", PAGES)
def test_templates_have_the_headings_of_the_filled_pages_and_name_files_of_a_run(name):
  files = [DOCS / f"{name}.md", DOCS / "templates" / f"{name}.md"]
  filled, template = (file.read_text("utf-8") for file in files)
  headings = [re.findall(r"^##.*", page, re.M) for page in (filled, template)]
  assert headings[0] == headings[1] and len(headings[0]) >= 9
  named = set(re.findall(r"`([\w.]+\.(?:json|jsonl|yaml))`", template))
  assert named <= {path.name for path in RUN.iterdir()} | {"init_from.json", "fingerprint.json"}
  assert not re.search(r"\d\.\d|hippocampus|Anterior", template), "something of the example is left"


def test_scores_are_those_of_the_run():
  stages, card = read("validation.json"), rows(CARD)
  for stage, line in (("stage0", "generator"), ("stage1", "stage 1"), ("stage2", "stage 2")):
    m, s = stages[stage]["mean"], stages[stage]["structures"]
    assert card[line] == [
      f"{s['Anterior']['dice']:.4f}", f"{s['Posterior']['dice']:.4f}", f"{m['dice']:.4f}",
      f"{m['surface_dice']:.3f}", f"{m['hd95']:.2f}",
    ]
  last = stages["stage2"]
  for column, name in enumerate(("Anterior", "Posterior")):
    dice = {case: scores[name]["dice"] for case, scores in last["cases"].items()}
    low, high = min(dice, key=dice.get), max(dice, key=dice.get)
    means = last["structures"][name]
    for line, value in (
      ("Dice, lowest", f"{dice[low]:.4f} ({low})"),
      ("Dice, median", f"{median(dice.values()):.4f}"),
      ("Dice, highest", f"{dice[high]:.4f} ({high})"),
      ("standard deviation", f"{stdev(dice.values()):.3f}"),
      ("mean volume, ml: predicted, reference",
       f"{means['volume']:.3f}, {means['reference_volume']:.3f}"),
    ):
      assert card[line][column] == value


def test_known_failures_are_those_of_the_run():
  stages = read("validation.json")
  loss = stages["stage0"]["mean"]["dice"] - stages["stage2"]["mean"]["dice"]
  assert f"stage 2 is {loss:.4f} of Dice below the generator" in CARD
  cases = stages["stage2"]["cases"]
  below = {c for c, s in cases.items() if mean(x["dice"] for x in s.values()) < 0.8}
  assert below == {"hippocampus_164"}
  assert {c for c, s in cases.items() if max(x["hd95"] for x in s.values()) >= 4} == below
  assert [x["hd95"] for x in cases["hippocampus_164"].values()] == [4, 5]
  trust = rows((DOCS / "trust.md").read_text("utf-8"))
  whole = float(trust["as it is"][2])
  assert f"as thick cost {whole - float(trust['3'][2]):.3f} of Dice" in CARD
  assert f"half the height {whole - float(trust['1/2'][2]):.3f}" in CARD
  assert f"inverted intensities leave {trust['inverted'][2]}" in CARD


def test_networks_versions_and_steps_are_those_of_the_run():
  config, plan, versions = load_config(RUN / "config.yaml", []), load_plan(RUN / "plan.json"), read(
    "versions.json")
  size = lambda tree: sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))  # noqa: E731
  unet, key = generator_network(config.generator, plan), jax.random.key(0)
  generator = size(jax.eval_shape(lambda k: init_generator(unet, len(plan.channels), k), key))
  refiner = size(jax.eval_shape(lambda k: init(config.sam2, k), key))
  card = rows(CARD)
  assert card["parameters"][0].startswith(f"generator {generator:,}, refiner {refiner:,};")
  assert f"in {len(config.refinement.stages)} stages" in card["what"][0]
  assert card["made by"][0].startswith(
    f"rfmedsam2-jax {versions['rfmedsam2-jax']}, JAX {versions['jax']}, Flax {versions['flax']}, "
    f"Python {versions['python']} ")
  labels = ", ".join(f"{s.values[0]} {s.name}" for s in plan.labels.structures)
  assert card["output"][0].endswith(f": {labels}")
  spacing, patch = (" x ".join(map(str, x)) for x in (plan.spacing, plan.patch_size))
  assert card["grid inside"][0].startswith(f"{spacing} mm, patches of {patch} voxels, z-score ")
  assert f"{spacing} mm, so that nothing is resampled" in " ".join(STATEMENT.split())
  last = {}
  for line in map(json.loads, (RUN / "log.jsonl").read_text("utf-8").splitlines()):
    last[line["phase"]] = line["step"]
  one_line = " ".join(CARD.split())
  assert f"{last['generator']} steps of the generator, {last['refiner']} of the refiner" in one_line
  assert f"for {last['refiner']} steps from scratch" in one_line
  assert f"keeps {config.refinement.generator_weight} of the vote" in one_line
  assert f"Seed {config.seed}, split seed {config.data.split.seed}." in CARD
  minutes = int(re.search(r"(\d+) minutes in all", (RUN / "README.md").read_text("utf-8"))[1])
  energy = minutes / 60 * 2 * 15 / 1000
  assert f"{minutes} minutes on two CPU cores" in CARD
  assert f"it is {energy:.2f} kWh" in one_line and f"another one, {energy * 0.4:.2f} kg" in one_line


def test_cases_are_those_of_the_split():
  splits = read("splits.json")
  train, held_out = len(splits["train"]), len(splits["validation"])
  assert rows(STATEMENT)["training"] == [str(train)]
  assert rows(STATEMENT)["held out"] == [str(held_out)]
  assert f"{train} cases of Task04" in CARD and f"{held_out} other cases" in CARD
  assert f"Used are {train + held_out}" in STATEMENT
  assert f"with seed {splits['config']['seed']}" in STATEMENT


@pytest.mark.skipif(not VOLUMES.is_dir(), reason="the volumes of ../shared/data are absent")
def test_volumes_are_as_stated():
  splits, shapes, largest, volumes, spacings = read("splits.json"), [], [], [], set()
  for case in splits["train"] + splits["validation"]:
    image, labels = (
      nib.load(VOLUMES / part / f"{case}.nii.gz") for part in ("imagesTr", "labelsTr"))
    shapes.append(image.shape)
    spacings |= set(image.header.get_zooms())
    largest.append(np.asarray(image.dataobj).max())
    counts = np.bincount(np.asarray(labels.dataobj).astype(int).ravel(), minlength=3)
    volumes.append(counts[1:] * np.prod(image.header.get_zooms()) / 1000)
  assert spacings == {1.0}
  low, high = np.min(shapes, axis=0), np.max(shapes, axis=0)
  stated = " x ".join(f"{a} to {b}" for a, b in zip(low, high, strict=True))
  text = " ".join(STATEMENT.split())
  assert f"{stated} voxels of 1.0 mm" in text
  assert f"between {min(largest):.0f} and {max(largest) / 1e6:.1f} million" in text
  for value, a, b in zip("12", np.min(volumes, axis=0), np.max(volumes, axis=0), strict=True):
    assert rows(STATEMENT)[value][1] == f"{a:.2f} to {b:.2f}"


def test_no_card_names_a_path_that_is_not_there():
  for page in (DOCS / "model_card.md", DOCS / "data_statement.md",
               *(DOCS / "templates").glob("*.md")):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
      assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"
