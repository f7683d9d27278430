"""Automatic segmentation: a volume in, a label map out, and how sure it is."""
