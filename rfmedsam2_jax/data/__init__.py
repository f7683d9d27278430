"""Data: volumes in and out, data sets, fingerprint and plan, preprocessing."""
