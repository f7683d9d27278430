"""Prediction: sliding window, segmenter, evaluation."""
