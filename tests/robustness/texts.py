"""JSON and YAML that people write and that runs hold, damaged: prompts, configs, run folders."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import yaml
from damage import WAYS
from frame import Attempt, kind, main
from networks import damaged_folder
from volumes import predict

DEEP = "[" * 100_000 + "]" * 100_000
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
  f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
  for a, b in zip("abcdefghi", "bcdefghij", strict=True))
TEXTS = {
  "empty": b"", "null": b"null", "number": b"7", "text": b'"text"', "list": b"[]", "object": b"{}",
  "nested": DEEP.encode(), "not UTF-8": b"\xff\xfe\x00", "zeros": bytes(500), "NaN": b"NaN",
  "huge number": b"9" * 10_000, "BOM": b"\xef\xbb\xbf{}", "infinite": b"[1e999]",
}


def as_prompts(entry) -> bytes:
  return json.dumps(entry if isinstance(entry, list) else [entry]).encode()


BOX = {"label": 1, "box": [[4, 5, 6], [11, 12, 6]]}
ENTRIES = {
  "no label": {"box": BOX["box"]}, "label 0": {**BOX, "label": 0}, "label -1": {**BOX, "label": -1},
  "label 70000": {**BOX, "label": 70000}, "label 1e30": {**BOX, "label": 10**30},
  "label 1.5": {**BOX, "label": 1.5}, "label true": {**BOX, "label": True},
  "label text": {**BOX, "label": "1"}, "round 5 alone": {**BOX, "round": 10**30},
  "round -1": {**BOX, "round": -1}, "unknown key": {**BOX, "boxes": 1},
  "outside": {"label": 1, "box": [[4, 5, 60], [11, 12, 60]]},
  "far outside": {"label": 1, "box": [[4, 5, 1e300], [11, 12, 1e300]]},
  "beyond floats": {"label": 1, "points": [[10**400, 1, 1, 1]]},
  "NaN": {"label": 1, "points": [[math.nan, 1, 1, 1]]},
  "infinite": {"label": 1, "points": [[math.inf, 1, 1, 1]]},
  "spans slices": {"label": 1, "box": [[4, 5, 2], [11, 12, 6]]},
  "one corner": {"label": 1, "box": [[4, 5, 6]]}, "three": {"label": 1, "box": [[1, 1, 1]] * 3},
  "text in a box": {"label": 1, "box": [["4", 5, 6], [11, 12, 6]]},
  "null in a box": {"label": 1, "box": [[None, 5, 6], [11, 12, 6]]},
  "box is text": {"label": 1, "box": "all"}, "points is a number": {"label": 1, "points": 3},
  "points empty": {"label": 1, "points": []}, "inside is text":
  {"label": 1, "points": [[4, 5, 6, "yes"]]}, "inside is 7": {"label": 1, "points": [[4, 5, 6, 7]]},
  "list in a list": [[BOX]], "two boxes": [BOX, BOX], "null": [None],
  "many": [{"label": n, "points": [[4, 5, 6, 1]]} for n in range(1, 40)],
}


@kind("prompt files of track")
def prompts():
  def of(folder, stage, content):
    path = folder / "prompts.json"
    path.write_bytes(content)
    out = folder / "out"

    def says_the_same() -> str:
      wanted = sorted({str(entry["label"]) for entry in json.loads(content)})
      found = sorted(json.loads((out / "scan.json").read_text("utf-8"))["structures"])
      return "" if found == wanted else f"structures {found}, the file has {wanted}"
    return Attempt(
      lambda: main(["track", str(stage.scan), "--checkpoint", str(stage.checkpoint), "--out",
                    str(out), "--prompts", str(path)]),
      ("prompts.json", "label"), out, says_the_same)

  for name, content in {**TEXTS, **{k: as_prompts(v) for k, v in ENTRIES.items()}}.items():
    def make(folder, rng, stage, content=content):
      return of(folder, stage, content)
    yield name, make
  for way, damage in WAYS.items():
    for number in range(1):
      def damaged(folder, rng, stage, damage=damage):
        return of(folder, stage, damage((stage.place / "prompts.json").read_bytes(), rng))
      yield f"{way} {number}", damaged


@kind("prompt files of predict")
def given():
  def of(folder, stage, content, read=False):
    path = folder / "given.json"
    path.write_bytes(content)
    attempt = predict(stage, stage.scan, folder, "--prompts", "given", "--given", path)
    # A prompt that lies outside is told with the volume.
    return Attempt(attempt.call, ("given.json", "scan.nii.gz"), attempt.out,
                   lambda: "" if isinstance(json.loads(content), dict) else "read no object")

  for name, content in TEXTS.items():
    def make(folder, rng, stage, content=content):
      return of(folder, stage, content)
    yield name, make
  for name, entry in ENTRIES.items():
    def entries(folder, rng, stage, entry=entry):
      rows = entry if isinstance(entry, list) else [entry]
      rows = [{"structure": "liver", **{k: v for k, v in row.items() if k != "label"}}
              if isinstance(row, dict) else row for row in rows]
      return of(folder, stage, json.dumps({"scan": rows}).encode())
    if "label" not in name and "round" not in name:
      yield f"entry {name}", entries
  for name, value in (("case null", None), ("case text", "liver"), ("case number", 3)):
    def other(folder, rng, stage, value=value):
      return of(folder, stage, json.dumps({"scan": value}).encode())
    yield name, other
  for way, damage in WAYS.items():
    def damaged(folder, rng, stage, damage=damage):
      return of(folder, stage, damage((stage.place / "given.json").read_bytes(), rng))
    yield way, damaged


# What is wrong with these depends on the data set.
_WITH_DATA = ("data.split", "data.structures", "data.sam_channels=[9]", "plan.strides",
              "generator.features=[8]", "generator.init_from", "refiner.trainable", "mesh.data=99",
              "refiner.init_from")


def says_the_config(path: Path, found) -> str:
  """Why a Config is not what PyYAML reads, value by value."""
  from rfmedsam2_jax.config import config_tree

  def differs(tree, mine, where):
    if isinstance(tree, Mapping):
      if not isinstance(mine, Mapping):
        return "" if not tree else where
      for key, value in tree.items():
        if where == ".sam2" and key == "preset":
          continue
        if key not in mine:
          return f"{where}.{key}"
        if reason := differs(value, mine[key], f"{where}.{key}"):
          return reason
      return ""
    if isinstance(tree, list | tuple):
      if not isinstance(mine, list | tuple) or len(tree) != len(mine):
        return where
      pairs = enumerate(zip(tree, mine, strict=True))
      return next((r for i, (a, b) in pairs if (r := differs(a, b, f"{where}.{i}"))), "")
    if isinstance(tree, str) and not isinstance(mine, str):
      # A number that YAML takes for text, 1e-4; a word that it does not take for a truth value.
      return "" if str(mine) == tree or float(tree) == mine else where
    return "" if tree == mine else where
  where = differs(yaml.safe_load(path.read_text("utf-8")) or {}, config_tree(found), "")
  return f"{where} is not what YAML reads" if where else ""


@kind("configs")
def configs():
  def loaded(folder, content):
    from rfmedsam2_jax.config import load_config

    path = folder / "config.yaml"
    path.write_bytes(content)
    found = []

    def call() -> None:
      found.append(load_config(path))
    return Attempt(call, ("config.yaml",), None, lambda: says_the_config(path, found[0]))

  for way, damage in WAYS.items():
    for number in range(3):
      def make(folder, rng, stage, damage=damage):
        return loaded(folder, damage(stage.config.read_bytes(), rng))
      yield f"{way} {number}", make
  texts = {
    **TEXTS, "bomb": BOMB.encode(), "bomb in sam2": (BOMB + "sam2: *j\n").encode(),
    "tag": b"data: !!python/object/apply:os.mkdir [code-ran]", "merge": b"<<: 7",
    "anchor": b"a: *b",
    "itself": b"sam2: &a {stages: *a}", "tab": b"data:\n\tdataset: x",
    "two": b"seed: 1\n---\nseed: 2",
    "twice": b"seed: 1\nseed: 1", "date": b"seed: 2020-01-01", "binary": b"seed: !!binary aGVsbG8=",
    "set": b"data: !!set {a, b}", "number as key": b"7: 1", "null as key": b"null: 1",
    "list as key": b"? [a, b]\n: 1", "sexagesimal": b"seed: 1:30:00", "true": b"seed: yes",
  }
  for name, text in texts.items():
    def written(folder, rng, stage, text=text):
      return loaded(folder, text)
    yield f"text {name}", written
  values = (
    "seed=-1", "seed=1.5", "seed=text", "seed=[]", "seed=99999999999999999999999", "seed=null",
    "data.split.fraction=2", "data.split.fraction=.nan", "data.split.fraction=-1",
    "data.split.fold=9", "data.split.train_cases=0",
    "data.structures=[]", "data.structures=[nose]", "data.structures=7",
    "data.sam_channels=[]", "data.sam_channels=[9]", "data.sam_channels=[-1]", "data=null",
    "plan.spacing=[0,1,1]", "plan.spacing=[.nan,1,1]", "plan.spacing=[1e-9,1,1]",
    "plan.spacing=[.inf,1,1]", "plan.spacing=[1,1]", "plan.patch_size=[0,8,8]",
    "plan.patch_size=[1000000,1000000,1000000]", "plan.voxel_budget=-5", "plan.poolings=-1",
    "plan.intensity=[mri]", "plan.strides=[[1,1,1]]", "generator.features=[8]",
    "generator.features=[0,0]", "generator.features=[-8,16]", "generator.convs_per_stage=0",
    "generator.batch_size=0", "generator.batch_size=-1", "generator.loop.steps=-1",
    "generator.optimizer.learning_rate=.nan", "generator.optimizer.learning_rate=-1",
    "generator.init_from=/nowhere", "sam2.preset=sam9", "sam2.image_size=33",
    "sam2.image_size=0", "sam2.embed_dim=0", "sam2.d_model=31", "sam2.stages=[]",
    "sam2.trunk_heads=0", "refiner.slices=0", "refiner.structures=0",
    "refiner.trainable=[nothing]", "refiner.init_from=/nowhere", "refinement.cells_per_batch=0",
    "mesh.data=0", "mesh.data=99", "inference.overlap=1",
    "inference.overlap=.nan", "inference.batch_size=0", "unknown=1", "data.dataset=/nowhere",
    "=1", "seed", "a..b=1", "generator.features.x=1", "refinement.stages.9.residual=true",
    "refinement.stages.x=1", "data.dataset=az://bucket/data", "generator.init_from=s3a://b/c",
    "refiner.init_from=https://example.org/sam2.pt", "data.dataset=file:///data",
  )
  for override in values:
    def overridden(folder, rng, stage, override=override):
      out = folder / "run"
      key = override.partition("=")[0]
      words = {key, key.rpartition(".")[2], key.split(".")[0], override, "/nowhere"}
      return Attempt(
        # Without a data set: what is wrong must be seen before data is looked for.
        lambda: main(["train", str(stage.config), *([] if override.startswith(_WITH_DATA) else
                      ["data.dataset=/elsewhere"]), override, "--out", str(out)]),
        tuple(word for word in words if word), None, None)
    yield f"train {override}", overridden


@kind("run folders")
def runs():
  names = ("config.yaml", "plan.json", "fingerprint.json")
  for name in names:
    for way, damage in {**WAYS, "gone": None}.items():
      for number in range(2 if way != "gone" else 1):
        def make(folder, rng, stage, name=name, damage=damage):
          run = folder / "run"
          damaged_folder(stage.run, run, rng, damage, lambda p: p == run / name)
          return of(folder, stage, run, name)
        yield f"{name} {way} {number}", make
  for name in names:
    for text, content in TEXTS.items():
      def texts(folder, rng, stage, name=name, content=content):
        run = folder / "run"
        shutil.copytree(stage.run, run)
        (run / name).write_bytes(content)
        return of(folder, stage, run, name)
      yield f"{name} {text}", texts
  for phase in ("generator", "refiner"):
    for way, damage in {**WAYS, "gone": None}.items():
      for number in range(2):
        def params(folder, rng, stage, phase=phase, damage=damage):
          run = folder / "run"
          name = damaged_folder(stage.run, run, rng, damage, lambda p: phase in p.parts
                                and "params" in p.relative_to(run).parts)
          return of(folder, stage, run, phase, name)
        yield f"{phase}'s params {way} {number}", params

  def of(folder, stage, run, *names):
    out = folder / "out"

    def same() -> str:
      """The files that count still say what they said, so the prediction is the same."""
      import rfmedsam2_jax

      model = rfmedsam2_jax.load(run)
      ours, theirs = (json.loads((r / "plan.json").read_text("utf-8")) for r in (run, stage.run))
      if ours != theirs or model.refinement != stage.model.refinement:
        return ""  # another plan that is valid
      return same_as_ever(stage, model)
    return Attempt(
      lambda: main(["predict", str(run), str(stage.scan), "--out", str(out)]),
      ("run/", "run:", *names), out, same)


def same_as_ever(stage, model) -> str:
  import jax
  import numpy as np

  pairs = ((model.generator, stage.model.generator), (model.refiner, stage.model.refiner))
  for ours, theirs in pairs:
    if jax.tree.structure(ours) != jax.tree.structure(theirs):
      return ""  # the config says another network
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), ours, theirs)
    if not all(jax.tree.leaves(same)):
      return "parameters are not those that were saved"
  return ""


