"""A model as one file: out of a run, passed on, and into the folder of a user's models."""
