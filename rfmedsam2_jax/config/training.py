"""How the two networks are trained: steps, optimizer, what is saved and when."""

import dataclasses
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rfmedsam2_jax.base.ranges import STRICT, Axis, Count, Place, Precision, Share, Weight, Whole
from rfmedsam2_jax.data.augmentation import AugmentationConfig
from rfmedsam2_jax.data.prompt_mistakes import PromptCorruptionConfig
from rfmedsam2_jax.nn.losses import GeneratorLossConfig, RefinerLossConfig
from rfmedsam2_jax.nn.remat import Remat


@dataclasses.dataclass(frozen=True)
class _Optimizer:
  """AdamW or SGD with warm-up and decay to zero, clipped by global norm."""

  __pydantic_config__ = STRICT

  name: Literal["adamw", "sgd"] = "adamw"  # sgd has Nesterov momentum 0.99, as in nnU-Net
  learning_rate: Weight = 1e-3  # peak, after warm-up
  warmup_steps: Whole = 50  # linear from 0
  weight_decay: Weight = 1e-4  # on arrays of two or more axes only; gains and biases are left alone
  clip_norm: Annotated[float, Field(ge=1e-12, le=1e12)] = 12.0
  # Global norm of the gradient; larger gradients are scaled down.
  ema_decay: Share = 0.99  # of the averaged weights that are kept in the end; 0 keeps the last ones


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(_Optimizer):
  schedule: Literal["cosine", "poly"] = "cosine"  # poly: (1 - step / steps)^0.9, as in nnU-Net


@dataclasses.dataclass(frozen=True)
class RefinerOptimizerConfig(_Optimizer):
  schedule: ClassVar[str] = "cosine"


Optimizer = OptimizerConfig | RefinerOptimizerConfig


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """One phase of training."""

  __pydantic_config__ = STRICT

  steps: Whole = 1000
  log_every: Count = 20  # steps between lines of the log; each is a mean over them
  checkpoint_every: Count = 200  # steps; at most so many are lost when a run is killed
  keep_checkpoints: Count = 2  # the last ones
  keep_best: Whole = 0  # further ones, those with the highest mean Dice at `validate_every`
  validate_every: Whole = 0  # steps; 0 validates only at the end
  validation_cases: Whole = 4  # cases of a validation between; all are scored at the end


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
  """The prompt generator (3D U-Net) and its training."""

  __pydantic_config__ = STRICT

  init_from: Place = ""  # checkpoint folder of a generator to start from; "" starts from scratch
  # Made by `rfmedsam2 convert nnunet`; relative to the working directory. Network and labels must
  # be the checkpoint's. With loop.steps=0 it is used as it is.
  features: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
  # Per stage; None: 32 doubling up to 320, as in nnU-Net.
  convs_per_stage: Count = 2  # of a plain encoder, and of its decoder
  blocks: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
  # Per stage, of two convolutions with a skip each: nnU-Net's ResEnc, which has 1, 3, 4, 6, 6 ...
  # and takes longer. None: a plain encoder.
  decoder_convs: Count | None = None  # per stage of the decoder; None: as many as convs_per_stage,
                                      # behind a residual encoder 1
  members: Count = 1  # networks whose logits are averaged: the folds of a converted nnU-Net
  mirrored: tuple[Axis, ...] = ()
  # Axes (0 slices, 1 rows, 2 columns) along which the network sees volumes mirrored: one that was
  # trained on files that are not stored as LPS, see docs/convert.md.
  dtype: Precision = "float32"  # of the arithmetic
  remat: Remat = "none"
  # What is kept of a convolution with its norm (residual: of a block) for the backward pass.
  # "none": all. "block": its input, at a third more time per step. "dots": also the convolutions'
  # outputs, at little more.
  batch_size: Count = 2
  microbatches: Count = 1  # parts of a batch, one after the other; memory falls, time rises
  oversample_foreground: Share = 0.33  # share of patches centred on some structure
  loop: LoopConfig = LoopConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  loss: ClassVar[GeneratorLossConfig] = GeneratorLossConfig()
  augmentation: AugmentationConfig = AugmentationConfig()


@dataclasses.dataclass(frozen=True)
class UnvalidatedLoopConfig:
  """As LoopConfig; nothing is validated between: what MaskAdapter and tracker are worth shows in
  other parts."""

  __pydantic_config__ = STRICT

  steps: Whole = 1000
  log_every: Count = 20
  checkpoint_every: Count = 200
  keep_checkpoints: ClassVar[int] = 2
  keep_best: ClassVar[int] = 0
  validate_every: ClassVar[int] = 0
  validation_cases: ClassVar[int] = 4


@dataclasses.dataclass(frozen=True)
class MaskAdapterOptimizerConfig:
  """As OptimizerConfig; a network this small is trained well by what is the same for all."""

  __pydantic_config__ = STRICT

  learning_rate: Weight = 1e-3
  warmup_steps: Whole = 50
  clip_norm: Annotated[float, Field(ge=1e-12, le=1e12)] = 12.0
  name: ClassVar[str] = "adamw"
  schedule: ClassVar[str] = "cosine"
  weight_decay: ClassVar[float] = 1e-4
  ema_decay: ClassVar[float] = 0.99


@dataclasses.dataclass(frozen=True)
class MaskAdapterConfig:
  """Training of the MaskAdapter before that of the refiner as a whole, on the same kind of batches.

  One from scratch learns several times as fast where SAM 2 is not run beside it. For stages that
  are `residual`; with loop.steps=0 it is trained with all else.
  """

  __pydantic_config__ = STRICT

  batch_size: Count = 2  # runs
  loop: UnvalidatedLoopConfig = UnvalidatedLoopConfig(steps=0)
  optimizer: MaskAdapterOptimizerConfig = MaskAdapterOptimizerConfig(
    learning_rate=4e-3, clip_norm=1.0)
  microbatches: ClassVar[int] = 1  # without SAM 2 beside it, a batch is small


@dataclasses.dataclass(frozen=True)
class RefinerConfig:
  """Training of SAM 2 as the refiner, on runs of consecutive slices."""

  __pydantic_config__ = STRICT

  init_from: Place = ""  # checkpoint of SAM 2 weights to start from; "" starts from scratch
  # Made by `rfmedsam2 convert`, or refiner/params of a run; relative to the working directory. Or
  # `builtin`, the weights of the package, for which sam2.preset is builtin. The network must be
  # that of `sam2`; image side, dtype and adapters are the config's own. The decoder is left as it
  # is in residual stages too, where one from scratch starts silent.
  trainable: Annotated[tuple[str, ...], Field(min_length=1)] = ("*adapter*",)
  # Patterns (fnmatch) of parameter paths such as image_encoder/trunk/blocks_0/...; all others stay
  # frozen, without gradient or optimizer state. "*" trains everything.
  frozen_dtype: Precision = "float32"  # in which frozen weights are held
  # bfloat16 rounds them to 8 bits, for good: what is saved in the end are the rounded values. Worth
  # it together with sam2.dtype=bfloat16, which computes with such values anyway.
  batch_size: Count = 1  # runs
  microbatches: Count = 1  # parts of a batch, one after the other; memory falls, time rises
  slices: Count = 8  # consecutive slices of a run; memory and time grow with it
  structures: Count = 2  # organs of a run
  held_back: Share = 0.0
  # Share of the training cases that the generator does not see and that the refiner is trained on
  # alone. A generator does better on cases that it has seen than on new ones, and a refiner trained
  # on those learns to leave masks alone. 0: both are trained on all.
  box_jitter: ClassVar[float] = 0.1
  # Edges of boxes are moved by up to this share of their size, and 20 of 1024 pixels, as in SAM 2.
  oversample_foreground: ClassVar[float] = 0.8  # share of runs that are sure to hold a structure
  mask_adapter: MaskAdapterConfig = MaskAdapterConfig()
  loop: LoopConfig = LoopConfig()
  optimizer: RefinerOptimizerConfig = RefinerOptimizerConfig(clip_norm=1.0)
  loss: RefinerLossConfig = RefinerLossConfig()
  augmentation: AugmentationConfig = AugmentationConfig()
  corruption: PromptCorruptionConfig = PromptCorruptionConfig()
