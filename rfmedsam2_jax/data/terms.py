"""Coded terms of structures: what DICOM says of a segment besides its name.

SNOMED CT codes are those that the DICOM standard itself uses (PS3.16) and so may be used freely in
its objects. A structure that is neither in the table here nor in the config is called a selected
region: true of all of them, and no guess.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple


class Code(NamedTuple):
  """One term of a coding scheme."""

  value: str
  scheme: str
  meaning: str


class Term(NamedTuple):
  """What a segment shows: its category, its type and, of organs in pairs, its side."""

  category: Code
  type: Code
  side: Code | None = None

  @property
  def known(self) -> bool:
    return self.type != REGION

  @property
  def anatomical(self) -> bool:
    return self.category == ANATOMY


ANATOMY = Code("123037004", "SCT", "Anatomical Structure")
ABNORMAL = Code("49755003", "SCT", "Morphologically Abnormal Structure")
CONCEPT = Code("309825002", "SCT", "Spatial and Relational Concept")
REGION = Code("111099", "DCM", "Selected region")
SIDES = {"left": Code("7771000", "SCT", "Left"), "right": Code("24028007", "SCT", "Right")}
ALGORITHM = Code("123110", "DCM", "Artificial Intelligence")

# By what stands in the standard; the words behind are other names of data sets.
_ANATOMY = {
  "Adrenal gland": ("23451007", "adrenal"), "Amygdala": ("4958002",), "Aorta": ("15825003",),
  "Bladder": ("89837001", "urinary bladder"), "Blood Vessel": ("59820001", "vessel", "vessels"),
  "Bone": ("3138006", "bones"), "Brain": ("12738006",), "Brain Stem": ("119238007", "brainstem"),
  "Breast": ("76752008",), "Cerebellum": ("113305005",), "Clavicle": ("51299004", "clavicula"),
  "Colon": ("71854001",), "Duodenum": ("38848004",),
  "Esophagus": ("32849002", "oesophagus"), "Eye": ("81745001",), "Femur": ("71341001",),
  "Gallbladder": ("28231008", "gall bladder"), "Heart": ("80891009",),
  "Hepatic vein": ("8993003", "hepatic veins"), "Hippocampus": ("5366008",),
  "Humerus": ("85050009",), "Ileum": ("34516001",),
  "Inferior vena cava": ("64131007", "ivc", "postcava", "post cava"), "Jejunum": ("21306003",),
  "Kidney": ("64033007",), "Large intestine": ("14742008", "large bowel"), "Larynx": ("4596009",),
  "Left atrium": ("82471001", "heart atrium left", "la"),
  "Left ventricle": ("87878005", "heart ventricle left", "lv"), "Liver": ("10200004",),
  "Lung": ("39607008",), "Mandible": ("91609006",), "Ovary": ("15497006",),
  "Pancreas": ("15776009",), "Parotid gland": ("45289007", "parotid"),
  "Portal vein": ("32764006",), "Prostate": ("41216001",), "Pulmonary artery": ("81040000",),
  "Pulmonary vein": ("122972007",), "Putamen": ("89278009",), "Rectum": ("34402009",),
  "Rib": ("113197003", "ribs"), "Right atrium": ("73829009", "heart atrium right", "ra"),
  "Right ventricle": ("53085002", "heart ventricle right", "rv"), "Sacrum": ("54735007",),
  "Scapula": ("79601000",), "Skull": ("89546000",),
  "Small intestine": ("30315005", "small bowel"), "Spinal cord": ("2748008",),
  "Spleen": ("78961009",), "Splenic vein": ("35819009",), "Sternum": ("56873002",),
  "Stomach": ("69695003",), "Submandibular gland": ("54019009",),
  "Superior vena cava": ("48345005", "svc"), "Testis": ("40689003",), "Thalamus": ("42695009",),
  "Thyroid": ("69748006", "thyroid gland"), "Trachea": ("44567001",), "Uterus": ("35039007",),
  "Vertebra": ("51282000", "vertebrae")}
_ABNORMAL = {
  "Cyst": ("367643001",), "Edema": ("79654002", "oedema"), "Hemorrhage": ("50960005",),
  "Lesion": ("52988006",), "Necrosis": ("6574001",), "Neoplasm": ("108369006", "tumor", "tumour")}
_TABLE = {
  word: Term(category, Code(value, "SCT", meaning))
  for category, table in ((ANATOMY, _ANATOMY), (ABNORMAL, _ABNORMAL))
  for meaning, (value, *names) in table.items() for word in (meaning.casefold(), *names)}
_GIVEN = re.compile(r"(\S+) (\S+) (.+)")


def term_of(name: str, codes: Mapping[str, str] = {}) -> Term:
  """The term of a structure by its name; capitals and what stands between words do not count.

  Args:
    codes: of a config, by name: `SCT 10200004 Liver`. They go before the table.

  Raises:
    ValueError: a code of another form.
  """
  words = re.sub(r"[\W_]+", " ", name).strip().casefold()
  if name in codes:
    return Term(ANATOMY, read_code(codes[name]))
  if words in _TABLE:
    return _TABLE[words]
  sides = [word for word in words.split() if word in SIDES]
  base = " ".join(word for word in words.split() if word not in SIDES)
  if len(sides) == 1 and base in _TABLE:
    return _TABLE[base]._replace(side=SIDES[sides[0]])
  return Term(CONCEPT, REGION)


def read_code(text: str) -> Code:
  """`SCHEME VALUE MEANING`; ValueError for another form, or what DICOM has no room for."""
  match = _GIVEN.fullmatch(" ".join(text.split()))
  if match is None or len(match[1]) > 16 or len(match[2]) > 16 or len(match[3]) > 64:
    raise ValueError(f"{text!r} is no code; give scheme, value and meaning as in "
                     "SCT 10200004 Liver")
  return Code(match[2], match[1], match[3])


def code_item(code: Code) -> Any:
  """A code as an item of a sequence of pydicom."""
  from pydicom import Dataset

  item = Dataset()
  item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code
  return item
