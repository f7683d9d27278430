"""Weights of SAM 2 that others have published: what they are called, where they lie, their licence.

Names and addresses are those of the official repository (sam2 1.1.0) and of MedSAM2's; no weights
come with this package. SHA-256 of Meta's files are those that micro-sam and the extension
"Segment with SAM" of 3D Slicer check their downloads of the same addresses with; MedSAM2's files
have none that somebody else has written down.
"""

import dataclasses

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.kept import nearest

_APACHE = "Apache-2.0"
# Of https://huggingface.co/wanglab/MedSAM2.
_MEDSAM2 = "CC-BY-SA-4.0, and by their model card for research and education only"


@dataclasses.dataclass(frozen=True)
class Published:
  """preset: of its network. side: of its images, in pixels. repository: on the hub, where `file`
  lies. meta: path of the file at Meta's address, or "". sha256: "" if nobody trustworthy says it.
  """

  file: str
  preset: str
  side: int
  repository: str
  licence: str
  meta: str = ""
  sha256: str = ""


def _of_meta(version: str, date: str, hashes: dict[str, str]) -> dict[str, Published]:
  found = {}
  for size, sha256 in hashes.items():
    name = f"{version}_hiera_{size}"
    repository = f"facebook/{version}-hiera-{size.replace('_', '-')}"
    meta = f"segment_anything_2/{date}/{name}.pt"
    found[name] = Published(f"{name}.pt", name, 1024, repository, _APACHE, meta, sha256)
  return found


def _medsam2(file: str) -> Published:
  return Published(file, "sam2.1_hiera_tiny", 512, "wanglab/MedSAM2", _MEDSAM2)


PUBLISHED: dict[str, Published] = {
  **_of_meta("sam2.1", "092824", {
    "tiny": "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69",
    "small": "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38",
    "base_plus": "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5",
    "large": "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318"}),
  **_of_meta("sam2", "072824", {
    "tiny": "65b50056e05bcb13694174f51bb6da89c894b57b75ccdf0ba6352c597c5d1125",
    "small": "95949964d4e548409021d47b22712d5f1abf2564cc0c3c765ba599a24ac7dce3",
    "base_plus": "d0bb7f236400a49669ffdd1be617959a8b1d1065081789d7bbff88eded3a8071",
    "large": "7442e4e9b732a508f80e141e7c2913437a3610ee0c77381a66658c3a445df87b"}),
  "medsam2_latest": _medsam2("MedSAM2_latest.pt"),
  "medsam2_2411": _medsam2("MedSAM2_2411.pt"),
  "medsam2_ct_lesion": _medsam2("MedSAM2_CTLesion.pt"),
  "medsam2_mri_liver_lesion": _medsam2("MedSAM2_MRI_LiverLesion.pt"),
  "medsam2_us_heart": _medsam2("MedSAM2_US_Heart.pt"),
}


def published(name: str) -> Published:
  """UserError for a name that is none of published weights."""
  if name not in PUBLISHED:
    raise UserError(f"{name}: is none of the published weights{nearest(name, PUBLISHED)}; "
                    f"known are {', '.join(PUBLISHED)}")
  return PUBLISHED[name]
