"""All kinds of cases, in the order of the table."""

# ruff: noqa: F401, I001 - what is imported registers its kinds
import volumes
import geometry
import series
import voxels
import names
import labelmaps
import data_sets
import texts
import networks
import not_finite
import arrays
import places
from frame import KINDS, all_cases

__all__ = ["KINDS", "all_cases"]
