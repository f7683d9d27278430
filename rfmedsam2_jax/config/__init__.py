"""The config of an experiment, composed of the rooms' own dataclasses and read strictly."""
