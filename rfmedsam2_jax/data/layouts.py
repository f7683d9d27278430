"""Layouts of data set folders: that of the Decathlon, and nnU-Net's v2 (raw). Their cases' files.

In: a folder and its dataset.json. Out: `Case`s, and what lies in the folder beside them.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.files import whole
from rfmedsam2_jax.data.names import (
  ARCHIVE,
  DICOM_LABEL_ENDINGS,
  ENDINGS,
  IMAGE_ENDINGS,
  LeftOut,
  by_name,
  ending_of,
  is_label_name,
  listed,
  stem_of,
)


@dataclasses.dataclass(frozen=True)
class Case:
  """One case's files; `images` has one file per channel or one for all of them."""

  identifier: str
  images: tuple[Path, ...]
  label: Path | None = None


def decathlon_cases(folder: Path, entries: Sequence[Mapping[str, str]]
                     ) -> tuple[list[Case], list[LeftOut]]:
  """The cases that dataset.json lists, and what lies beside their files."""
  cases = []
  for entry in entries:
    image, label = folder / entry["image"], folder / entry["label"]
    if ending_of(image).lower() not in IMAGE_ENDINGS and not image.is_dir():
      raise UserError(f"{image}: does not end in {', '.join(ENDINGS)}; convert it")
    cases.append(Case(stem_of(image), (image,), label))
  used = {os.path.abspath(file) for case in cases for file in (*case.images, case.label) if file}
  left_out = []
  for place in sorted({Path(file).parent for file in used}):
    if place.is_dir():
      listing = listed(place, is_label_name).taking(
        lambda file: "" if os.path.abspath(file) in used else "not in dataset.json")
      left_out += listing.left_out()
  return cases, left_out


def nnunet_cases(folder: Path, content: Mapping[str, Any], channels: int
                  ) -> tuple[list[Case], list[LeftOut]]:
  """The cases of imagesTr and labelsTr, or those that dataset.json lists; and what is left out."""
  if "dataset" in content:  # cases listed one by one, at any place
    return [
      Case(name, tuple(folder / image for image in entry["images"]), folder / entry["label"])
      for name, entry in content["dataset"].items()], []
  ending = content["file_ending"]
  if ending.lower() not in (*ENDINGS, ".dcm"):
    raise UserError(f"{folder / 'dataset.json'}: file_ending is {ending}; convert the volumes to "
                    f"one of {', '.join(ENDINGS)}, or give .dcm for DICOM")
  # Of DICOM images are folders of slices or archives of them.
  dicom = ending.lower() == ".dcm"
  allowed = (*DICOM_LABEL_ENDINGS, ARCHIVE) if dicom else (ending.lower(),)

  def other_ending(file: Path) -> str:
    fits = ending_of(file).lower() in allowed or (dicom and file.is_dir())
    return "" if fits else f"not {ending}, the file_ending"

  def no_channel(file: Path) -> str:
    numbered = re.fullmatch(r".+_[0-9]{4}", stem_of(file))
    return other_ending(file) or ("" if numbered else "no channel's number such as _0000")

  images = listed(folder / "imagesTr")
  if dicom:
    images = dataclasses.replace(images, files=sorted([*images.files, *images.series]))
  images = images.taking(no_channel)
  labels = listed(folder / "labelsTr", is_label_name).taking(other_ending)
  by_channel, by_case = by_name(images.files), by_name(labels.files)
  identifiers = dict.fromkeys(name[:-5] for name in by_channel)
  for name, file in by_channel.items():
    if int(name[-4:]) >= channels:
      raise UserError(f"{file}: is channel {int(name[-4:])} of case {name[:-5]}, and dataset.json "
                      f"has channels 0 to {channels - 1}; name it there or remove the file")
  for name, file in by_case.items():
    if identifiers and name not in identifiers:
      raise UserError(f"{file}: has no image in imagesTr; add it or remove the label map")
  found = []
  for name in identifiers:
    numbered = [f"{name}_{channel:04d}" for channel in range(channels)]
    found.append(Case(
      name, tuple(by_channel.get(one, images.folder / f"{one}{ending}") for one in numbered),
      by_case.get(name, labels.folder / f"{name}{ending}")))
  return found, [*images.left_out(), *labels.left_out()]


def check_count(path: Path, content: Mapping[str, Any], cases: Sequence[Case]) -> None:
  """UserError if numTraining is there and another number than that of the cases, as in nnU-Net."""
  if "numTraining" in content:
    said = whole(path, "numTraining", content["numTraining"])
    if said != len(cases):
      raise UserError(f"{path}: numTraining is {said}, but there are {len(cases)} training cases; "
                      "add or remove cases, or correct it")


def check_unique(cases: Sequence[Case]) -> None:
  seen: dict[str, Case] = {}
  for case in cases:
    first = seen.setdefault(case.identifier, case)
    if first is not case:
      raise UserError(f"{case.images[0]}: is a second case named {case.identifier} beside "
                      f"{first.images[0]}; rename one")
