"""What the backward pass keeps of a block, and what it computes again from the block's input.

A block that is computed again holds its inputs only; memory is then that of the largest block plus
one input each, for about a third more arithmetic. Parameters, outputs and gradients stay what they
are, and a network that is only run forwards compiles to the same program.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import flax.linen as nn
from jax import checkpoint_policies as policies

from rfmedsam2_jax.nn.platform import Platform, default_platform

Remat = Literal["none", "block", "dots"]
T = TypeVar("T", bound=Callable[..., Any])

CONVOLUTION = "convolution"  # jax.ad_checkpoint.checkpoint_name of a convolution's output

_KEPT = policies.save_from_both_policies(
  # Dense layers; the products of attention have batch axes, and their scores are what is large.
  policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(CONVOLUTION)
)


def rematerialised(block: T, remat: Remat, static: tuple[int, ...] = ()) -> T:
  """A block (module class, or function of a module) whose backward pass computes it again.

  "none" gives `block` itself; "block" keeps only what goes into it; "dots" also keeps what its
  dense layers and 3D convolutions give, so that little more than norms, activations and attention
  is done twice. `static`: places of arguments that are no arrays; the module counts as 0.
  """
  if remat == "none":
    return block
  policy = _KEPT if remat == "dots" else policies.nothing_saveable
  return nn.remat(block, policy=policy, static_argnums=static)


def compiler_options(platform: Platform | None = None) -> dict[str, str]:
  """Options of `jax.jit` for gradients, without which nothing is saved on a CPU. platform: None is
  the default backend.

  A barrier keeps XLA from computing a block again before the gradient of the next one is there.
  XLA:CPU removes the barriers before it orders the operations, and then does all of it at once, at
  the end of the forward pass. GPU and TPU remove them afterwards.
  """
  on_cpu = (platform or default_platform()).is_cpu
  return {"xla_disable_hlo_passes": "cse_barrier_expander"} if on_cpu else {}
