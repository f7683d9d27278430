"""The local page of `rfmedsam2 serve`: prompted tracking in a browser."""
