"""Volumes stored in every axis order and flip."""

import itertools

import nibabel as nib
import numpy as np

ORIENTATIONS = [
  (order, flips)
  for order in itertools.permutations(range(3))
  for flips in itertools.product((1, -1), repeat=3)
]


def reoriented(image: nib.Nifti1Image, orientation) -> nib.Nifti1Image:
  """The same volume in the same place, its axes permuted and flipped in the file."""
  order, flips = orientation
  return image.as_reoriented(np.array(list(zip(order, flips, strict=True)), float))
