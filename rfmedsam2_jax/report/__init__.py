"""Report: pictures and curves of a run."""
