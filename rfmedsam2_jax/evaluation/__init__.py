"""Scores of label maps: metrics, and folders of them."""
