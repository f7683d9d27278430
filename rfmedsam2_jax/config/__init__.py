"""The config of an experiment, composed of the rooms' own dataclasses and read strictly."""

from rfmedsam2_jax.config.experiment import Config, DataConfig
from rfmedsam2_jax.config.reading import config_tree, config_yaml, load_config, parse_config

__all__ = ["Config", "DataConfig", "config_tree", "config_yaml", "load_config", "parse_config"]
