"""Segmentation by hand: a person's prompts, and volumes followed from them."""
