"""What a prediction was asked for, looked at before any network is loaded. Needs no JAX.

In: the run's plan, paths as a person gave them. Out: a `Request`, for segmentation.predict.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.data.files import claim
from rfmedsam2_jax.data.formats import FORMAT_ENDINGS, Format
from rfmedsam2_jax.data.inputs import find_inputs, with_labels
from rfmedsam2_jax.data.layouts import Case
from rfmedsam2_jax.data.names import LeftOut
from rfmedsam2_jax.data.plan import Plan
from rfmedsam2_jax.data.prompt_entries import PromptEntry, read_entries_by_case
from rfmedsam2_jax.data.segmentations import check_format
from rfmedsam2_jax.segmentation.chosen import Choice, make_choice
from rfmedsam2_jax.segmentation.measured import check_table

Prompts = Literal["generated", "oracle", "given"]


@dataclasses.dataclass(frozen=True)
class Request:
  """Cases in, label maps out."""

  cases: Sequence[Case]  # with label maps where prompts come from them
  prompts: Prompts
  entries: Mapping[str, Sequence[PromptEntry]]  # a person's boxes and points, by case
  out: Path
  targets: Sequence[Path]  # the label map of each case
  left_out: Sequence[LeftOut]  # of the folders of inputs
  format: Format
  series: str | None  # which of a study's
  choice: Choice


def check_alike(plans: Sequence[Plan]) -> None:
  """UserError unless the runs of these plans segment the same, so that they can be averaged."""
  for other in plans[1:]:
    if other.labels != plans[0].labels or len(other.channels) != len(plans[0].channels):
      raise UserError("runs: were trained for other structures or channels; average like with like")


def make_request(
  plan: Plan, inputs: Sequence[str | Path], out: str | Path, prompts: Prompts,
  labels: str | Path | None, given: str | Path | None, overwrite: bool, format: Format,
  series: str | None = None, structures: Sequence[str] | None = None, min_volume: float = 0.0,
) -> Request:
  """Finds what is asked for, and makes the folder `out`; arguments as those of `predict`.

  Raises:
    UserError: inputs, label maps or prompts that are missing or wrong, structures that are unknown,
      arguments that contradict each other, results that exist (`ResultExists`), a format that
      cannot be written.
  """
  choice = make_choice(plan.labels, structures, min_volume)
  left_out: list[LeftOut] = []
  cases = find_inputs(inputs, len(plan.channels), left_out.append, series is not None)
  if prompts == "oracle" and labels is None:
    raise UserError('prompts="oracle": needs labels, the folder of true label maps')
  if prompts == "given" and labels is None and given is None:
    raise UserError('prompts="given": needs given, a file of boxes and points, or labels, sparse '
                    "label maps")
  if prompts == "generated" and (labels is not None or given is not None):
    raise UserError('labels and given: are read with prompts="oracle" or "given"; name one')
  entries = {} if given is None else read_entries_by_case(given, plan.labels)
  unknown = sorted(set(entries) - {case.identifier for case in cases})
  if unknown:
    raise UserError(f"{given}: case {unknown[0]} is not among the inputs; correct its name")
  cases = cases if labels is None else with_labels(cases, labels)
  out = Path(out)
  targets = [out / (case.identifier + FORMAT_ENDINGS[format]) for case in cases]
  check_format(format, cases=cases)
  details = [out / f"{case.identifier}.json" for case in cases]
  claim(out, [*targets, *details], overwrite)
  if not overwrite:
    check_table(out)
  return Request(cases, prompts, entries, out, targets, left_out, format, series, choice)
