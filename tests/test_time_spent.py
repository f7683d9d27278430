"""Goodput: where the time of a phase goes."""

import pytest

from rfmedsam2_jax.training import time_spent
from rfmedsam2_jax.training.time_spent import TimeSpent


def test_time_beside_the_steps_is_told_from_theirs(monkeypatch):
  """Restored and compiled for 20 s, 50 s of steps, 25 of validation, 5 of saving."""
  now = [120.0]
  monkeypatch.setattr(time_spent.time, "monotonic", lambda: now[0])
  spent = TimeSpent(100.0, now[0])
  for what, seconds in (("waiting", 10.0), ("validation", 25.0), ("saving", 5.0)):
    with spent.on(what):
      now[0] += seconds
  now[0] += 40.0
  assert spent.stepping(now[0]) == pytest.approx(55)  # a rate counts what saving costs
  assert spent.shares(now[0]) == {"goodput": 0.5, "data_wait": round(10 / 55, 4)}
