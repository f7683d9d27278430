"""What every room may use: errors, progress, interruption."""
