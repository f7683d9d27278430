"""Data: volumes in and out, data sets, plan, preprocessing, augmentation, batches."""
