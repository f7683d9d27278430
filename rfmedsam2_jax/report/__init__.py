"""What people look at: contact sheets, curves of a run, and pages for a browser."""
