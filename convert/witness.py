"""Another implementation of SAM 2 in PyTorch with the same weights, for convert.verify to ask."""

import abc
from typing import Any, NamedTuple

import numpy as np

Named = dict[str, np.ndarray]


class Prompted(NamedTuple):
  """points: float32 [N, P, 2], pixels. labels: int32 [N, P], 1 or 0. mask: logits [N, h, w]."""

  points: np.ndarray
  labels: np.ndarray
  mask: np.ndarray


class Witness(abc.ABC):
  """Answers of a PyTorch model by name; arrays are ours, [N, H, W, C]."""

  name: str
  model: Any
  pointer: Any  # the module that makes an object's pointer of its mask token

  def image(self, images: np.ndarray) -> Named:
    return dict(zip(("stride 4", "stride 8", "embedding"), self._levels(images), strict=True))

  def prompts(self, prompted: Prompted) -> Named:
    tokens, dense = self._prompts(prompted)
    return {"tokens": tokens.reshape(len(tokens), -1, tokens.shape[-1]).numpy(),
            "dense": nhwc(dense)}

  def decode(
    self, embedding: np.ndarray, high_res: list[np.ndarray], prompted: Prompted, multimask: bool
  ) -> Named:
    tokens, dense = self._prompts(prompted)
    masks, ious, chosen, presence = self._decode(
      image_embeddings=nchw(embedding), sparse_prompt_embeddings=tokens,
      dense_prompt_embeddings=dense, multimask_output=multimask,
      high_res=[nchw(x) for x in high_res],
    )
    pointer = self.pointer(chosen[:, ious[0].argmax() if multimask else 0])
    return {"masks": masks.numpy(), "ious": ious.numpy(), "presence": presence[:, 0].numpy(),
            "pointer": pointer.numpy()}

  @abc.abstractmethod
  def remember(self, embedding: np.ndarray, logits: np.ndarray, present: np.ndarray) -> Named: ...

  @abc.abstractmethod
  def condition(self, embedding: np.ndarray, maps: np.ndarray, pointers: np.ndarray) -> Named:
    """On slice 2 of 3, with slice 0 conditioning and slice 1 tracked."""

  @abc.abstractmethod
  def _levels(self, images: np.ndarray) -> list[np.ndarray]:
    """Image features, finest first."""

  @abc.abstractmethod
  def _prompts(self, prompted: Prompted) -> Any:
    """Sparse and dense embeddings, tensors as its decoder wants them."""

  @abc.abstractmethod
  def _decode(self, high_res: list[Any], **inputs: Any) -> tuple[Any, Any, Any, Any]:
    """Masks, IoUs, mask tokens and presence [N, 1], tensors."""


def nchw(x: np.ndarray) -> Any:
  """[N, H, W, C] array to a torch tensor [N, C, H, W]."""
  import torch

  return torch.from_numpy(np.array(x, np.float32)).permute(0, 3, 1, 2)


def flat(x: np.ndarray) -> Any:
  """[N, H, W, C] array to a torch tensor [HW, N, C], the order of memory attention."""
  return flat_tensor(nchw(x))


def flat_tensor(x: Any) -> Any:
  """[N, C, H, W] tensor to [HW, N, C]."""
  return x.flatten(2).permute(2, 0, 1)


def nhwc(x: Any) -> np.ndarray:
  """The inverse of `nchw`."""
  return x.permute(0, 2, 3, 1).numpy()
