"""Checkpoints, runs and an nnU-Net of which one number is NaN or infinite."""

import shutil

import numpy as np
from frame import Attempt, kind, main
from networks import convert, track


@kind("networks with numbers that are not finite")
def not_finite():
  def spoiled(params, rng, value):
    """One number, anywhere."""
    import jax

    params = jax.tree.map(np.array, params)
    leaves = jax.tree.leaves(params)
    leaves[int(rng.integers(len(leaves)))].flat[0] = value
    return params

  for value in (np.nan, np.inf, -np.inf):
    def checkpoint(folder, rng, stage, value=value):
      from rfmedsam2_jax.weights.checkpoint import load_checkpoint, save_checkpoint

      found = load_checkpoint(stage.checkpoint)
      save_checkpoint(folder / "checkpoint", found.config, spoiled(found.params, rng, value), {})
      return track(stage, folder / "checkpoint", folder)
    yield f"checkpoint {value}", checkpoint
    for network in ("generator", "refiner"):
      def run(folder, rng, stage, value=value, network=network):
        from rfmedsam2_jax.weights.orbax import save_params

        params = spoiled(getattr(stage.model, network), rng, value)
        shutil.copytree(stage.run, folder / "run")
        save_params(folder / "run" / network / "params", params, {})
        out = folder / "out"
        return Attempt(lambda: main(["predict", str(folder / "run"), str(stage.scan), "--out",
                                     str(out)]), (f"{network}/params",), out)
      yield f"{network} {value}", run

    def nnunet_model(folder, rng, stage, value=value):
      import torch

      (folder / "made").mkdir()
      shutil.copytree(stage.place / "nnunet", folder / "model")
      file = folder / "model" / "fold_0" / "checkpoint_final.pth"
      stored = torch.load(file, weights_only=False)
      tensors = list(stored["network_weights"].values())
      tensors[int(rng.integers(len(tensors)))].view(-1)[0] = value
      torch.save(stored, file)
      return convert(folder, "nnunet", folder / "model", folder / "made" / "ckpt",
                     names=("checkpoint_final.pth",))
    yield f"nnU-Net {value}", nnunet_model
