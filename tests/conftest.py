"""Its place makes the helpers beside it (torch_sam2) importable from every test."""
