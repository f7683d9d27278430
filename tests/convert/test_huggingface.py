"""Hugging Face's checkpoints, written by `transformers` itself, and it as a second witness.

Its implementation of SAM 2 is another than the official one: what it computes from its own file is
what our network computes from the converted one.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_sam2
import yaml
from safetensors.numpy import load_file, save_file
from torch_sam2 import TINY, nchw, relative_error, torch

from convert.__main__ import main
from convert.huggingface import to_official_names
from convert.recognise import recognise
from convert.transformers_model import transformers_config
from rfmedsam2_jax.nn import PRESETS, SAM2, MemorySlots, Prompts, apply, box_prompts, no_prompts
from rfmedsam2_jax.weights.checkpoint import load_checkpoint
from rfmedsam2_jax.weights.names import official_shapes

transformers = pytest.importorskip("transformers")

# transformers has memories of 64 channels only.
SMALL = dataclasses.replace(TINY, d_model=128, mem_dim=64)
TOLERANCE = 1e-5
SIDE, GRID = SMALL.image_size, SMALL.grid


def saved(model, folder):
  torch_sam2.draw_tensors(model)
  model.shared_image_embedding.load_state_dict(model.prompt_encoder.shared_embedding.state_dict())
  model.mask_decoder.pred_obj_score_head.proj_out.bias.data.fill_(3.0)
  model.save_pretrained(folder)
  return model.eval()


@pytest.fixture(scope="module")
def small_yaml(tmp_path_factory):
  """The side that it says is not the right one: that comes from the folder's own config.json."""
  tree = {"sam2": json.loads(json.dumps(dataclasses.asdict(SMALL))) | {"image_size": 1024}}
  path = tmp_path_factory.mktemp("configs") / "small.yaml"
  path.write_text(yaml.safe_dump(tree))
  return str(path)


@pytest.fixture(scope="module")
def video(tmp_path_factory, small_yaml):
  """Folder, model, converted parameters of a Sam2VideoModel."""
  folder = tmp_path_factory.mktemp("video")
  model = saved(transformers.Sam2VideoModel(transformers_config(SMALL)), folder / "hf")
  assert main([str(folder / "hf"), str(folder / "ckpt"), "--config", small_yaml]) == 0
  config, params, _ = load_checkpoint(folder / "ckpt")
  assert config == SMALL
  return folder / "hf", model, params


@pytest.fixture(scope="module")
def image(tmp_path_factory):
  """Folder and model of a Sam2Model."""
  folder = tmp_path_factory.mktemp("image") / "hf"
  parts = transformers_config(SMALL)
  config = transformers.Sam2Config(
    vision_config=parts.vision_config,
    prompt_encoder_config=parts.prompt_encoder_config.to_dict(),
    mask_decoder_config=parts.mask_decoder_config.to_dict(),
  )
  return folder, saved(transformers.Sam2Model(config), folder)


def random(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", ["sam2.1_hiera_base_plus", "sam2_hiera_tiny"])
def test_every_tensor_of_a_video_model_has_an_official_name_and_tells_its_size(name):
  config = PRESETS[name]
  with torch.device("meta"):
    model = transformers.Sam2VideoModel(transformers_config(config))
  tensors = {n: np.broadcast_to(np.float32(0), x.shape) for n, x in model.state_dict().items()}
  found = {name: x.shape for name, x in to_official_names(tensors).items()}
  assert found == official_shapes(config)
  assert recognise(found, "hf") == name


@pytest.mark.parametrize("multimask", [False, True])
def test_an_image_with_points_box_and_mask(image, small_yaml, tmp_path, capsys, multimask):
  folder, model = image
  arguments = [str(folder), str(tmp_path / "ckpt"), "--config", small_yaml]
  assert main(arguments) == 2
  assert "allow memory" in capsys.readouterr().err
  assert main([*arguments, "--allow", "memory"]) == 0
  config, params, about = load_checkpoint(tmp_path / "ckpt")
  assert "maskmem_tpos_enc" in about["fresh"] and "no_mem_embed" not in about["fresh"]

  pixels, mask = random(0, 1, SIDE, SIDE, 3), 4 * random(1, 1, 4 * GRID, 4 * GRID)
  points, labels = np.array([[[30.0, 41.5], [80.0, 9.0]]], np.float32), np.array([[1, 0]])
  box = np.array([[20.0, 5.0, 100.0, 90.0]], np.float32)
  with torch.no_grad():
    theirs = model(
      pixel_values=nchw(pixels), input_points=torch.tensor(points)[:, None],
      input_labels=torch.tensor(labels)[:, None], input_boxes=torch.tensor(box)[:, None],
      input_masks=nchw(mask[..., None]), multimask_output=multimask,
    )

  @jax.jit
  def ours(params):
    features = apply(config, params, pixels, method="encode_image")
    corners = box_prompts(jnp.asarray(box))
    prompts = Prompts(jnp.concatenate([points, corners.points], axis=1),
                      jnp.concatenate([labels, corners.labels], axis=1), jnp.asarray(mask))
    embedding = apply(config, params, features.embedding, method="unconditioned")
    return apply(config, params, embedding, features.high_res, prompts, multimask=multimask,
                 method="decode")

  decoded = ours(params)
  assert relative_error(decoded.masks, theirs.pred_masks[:, 0]) < TOLERANCE
  assert relative_error(decoded.ious, theirs.iou_scores[:, 0]) < TOLERANCE
  assert relative_error(decoded.presence, theirs.object_score_logits[:, 0, 0]) < TOLERANCE


@pytest.mark.slow
def test_three_slices_followed_by_the_video_model(video):
  """Box on the first, then two tracked slices, memories rounded to bfloat16 as it does."""
  _, model, params = video
  slices, box = random(5, 3, SIDE, SIDE, 3), np.array([[20.0, 5.0, 100.0, 90.0]], np.float32)
  session = transformers.models.sam2_video.modeling_sam2_video.Sam2VideoInferenceSession(
    video=nchw(slices), video_height=SIDE, video_width=SIDE, dtype=torch.float32
  )
  index = session.obj_id_to_idx(1)
  session.add_point_inputs(index, 0, {
    "point_coords": torch.tensor(box).reshape(1, 1, 2, 2),
    "point_labels": torch.tensor([[[2, 3]]], dtype=torch.int32),
  })
  session.obj_with_new_inputs = [1]
  with torch.inference_mode():
    theirs = [model(session, frame_idx=t) for t in range(3)]

  def run(method, *inputs, **options):
    call = jax.jit(lambda params, inputs: SAM2(SMALL).apply(
      {"params": params}, *inputs, method=method, **options))
    return call(params, inputs)

  features = run("encode_image", slices)
  maps, pointers = [], []
  for t in range(3):
    embedding, high_res = features.embedding[t : t + 1], [x[t : t + 1] for x in features.high_res]
    if t == 0:
      given = run("unconditioned", embedding)
      decoded = run("decode", given, high_res, box_prompts(jnp.asarray(box)))
    else:
      slots = MemorySlots(
        maps=jnp.stack(maps, axis=1), valid=jnp.ones((1, t), bool),
        # The prompted slice has the last row, the one before this one the first.
        rows=jnp.array([[SMALL.num_maskmem - 1, *range(t - 2, -1, -1)]]),
        pointers=jnp.stack(pointers, axis=1), pointer_valid=jnp.ones((1, t), bool),
        pointer_positions=jnp.arange(t, 0, -1)[None] / 2.0,
      )
      conditioned = run("condition", embedding, slots)
      decoded = run("decode", conditioned, high_res, no_prompts(1), multimask=True)
    assert decoded.presence[0] > 0
    best = int(decoded.ious[0].argmax())
    mask = decoded.masks[:, best]
    assert relative_error(mask, theirs[t].pred_masks[:, 0]) < 3e-5, t
    maps.append(run("remember", embedding, mask, jnp.array([True]), binarize=t == 0)
                .astype(jnp.bfloat16).astype(jnp.float32))
    pointers.append(decoded.pointer)


def test_it_is_the_witness_of_its_own_names(video, small_yaml, tmp_path, capsys):
  folder, _, _ = video
  assert main([str(folder), str(tmp_path / "ckpt"), "--config", small_yaml,
               "--verify"]) == 0
  out = capsys.readouterr().out
  assert "largest difference to transformers" in out
  assert all(float(line.split()[2]) < TOLERANCE for line in out.splitlines()
             if line.startswith("    memory"))


def test_a_folder_in_pieces_is_the_same(video, small_yaml, tmp_path, capsys):
  _, model, params = video
  model.save_pretrained(tmp_path / "hf", max_shard_size="2MB")
  assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
  arguments = [str(tmp_path / "hf"), str(tmp_path / "ckpt"), "--config", small_yaml]
  assert main(arguments) == 0
  found = load_checkpoint(tmp_path / "ckpt")
  jax.tree.map(np.testing.assert_array_equal, found.params, params)
  assert len(found.about["source"]["sha256"]) > 1
  next((tmp_path / "hf").glob("*.safetensors")).unlink()
  assert main([*arguments, "--overwrite"]) == 2
  assert "is missing; download the folder again" in capsys.readouterr().err


def test_two_fourier_matrices_that_differ_are_refused(video, small_yaml, tmp_path, capsys):
  """The official network has one; transformers would embed points and grid by different ones."""
  folder, _, _ = video
  tensors = load_file(folder / "model.safetensors")
  name = "shared_image_embedding.positional_embedding"
  save_file(tensors | {name: tensors[name] + 1}, tmp_path / "model.safetensors")
  assert main([str(tmp_path / "model.safetensors"), str(tmp_path / "ckpt"), "--config",
               small_yaml]) == 2
  assert name in capsys.readouterr().err
