"""The `shard` command: the steps of all phases on a mesh of devices that need not exist."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from rfmedsam2_jax.base.errors import UserError
from rfmedsam2_jax.base.progress import Report, silent
from rfmedsam2_jax.config import Config
from rfmedsam2_jax.data.datasets import Labels, Structure
from rfmedsam2_jax.data.plan import ChannelRule, Plan, PlanConfig, pooling
from rfmedsam2_jax.parallel.mesh import make_mesh
from rfmedsam2_jax.training.phases import PHASES, PhaseName, check_batches
from rfmedsam2_jax.training.step_report import report_step


def shard(
  config: Config, channels: int, structures: int, phases: Sequence[PhaseName],
  report: Callable[[str], None] = print, compiles: bool = True, progress: Report = silent,
) -> None:
  """Reports what every device would hold and send; reads no data.

  Args:
    channels, structures: of the data set. phases: whose steps.
    compiles: False leaves out what only the compiled step tells.
    progress: takes lines about what is done.

  Raises:
    UserError: a mesh that these devices do not make, a batch that does not spread over it.
  """
  mesh = make_mesh(config.mesh)
  plan = _plan_of_shapes(config.plan, channels, structures)
  check_batches(config, phases, mesh)
  key = jax.random.key(0)
  for phase in [PHASES[name](config, plan) for name in phases]:
    progress(f"{phase.name}: laying out" + (" and compiling the training step" if compiles else ""))
    state = jax.eval_shape(lambda key, phase=phase: phase.start(phase.init(key), key), key)
    report_step(phase, state, mesh, report, compiles)


def _plan_of_shapes(config: PlanConfig, channels: int, structures: int) -> Plan:
  """A plan that has the sizes of a real one."""
  patch, spacing = config.patch_size, config.spacing or (1.0, 1.0, 1.0)
  if patch is None:
    raise UserError("plan.patch_size: is left to the data set, which is not read here; give it, as "
                    "in plan.patch_size=[96,160,160]")
  strides, kernels, size = pooling(np.array(spacing), np.array(patch), config.poolings)
  values = tuple(range(1, structures + 1))
  labels = Labels(tuple(Structure(f"structure {k}", (k,)) for k in values), False, values)
  rules = tuple(ChannelRule(f"channel {k}", "zscore") for k in range(channels))
  depth, height, width = (int(n) for n in size)
  patch = depth, height, width
  return Plan("shapes", 0, spacing, patch, rules, patch, strides, kernels, labels)
