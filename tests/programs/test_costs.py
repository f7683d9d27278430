"""What a compiled program is said to cost, against XLA's own counts and programs without loops."""

import contextlib
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from rfmedsam2_jax.nn.attention import dot_product_attention
from rfmedsam2_jax.nn.platform import Platform
from rfmedsam2_jax.programs.costs import Collective, collectives_of, cost_of

shaped = jax.ShapeDtypeStruct


def floats(*shape):
  return shaped(shape, jnp.float32)


def text_of(function, *arguments, **options):
  return jax.jit(function).lower(*arguments).compile(**options).as_text()


def layers(unroll):
  """Loss and gradients of seven layers, each of a product and a convolution."""

  def layer(x, weights):
    dense, kernel = weights
    x = jnp.tanh(x @ dense)
    y = lax.conv_general_dilated(
      x.reshape(2, 4, 4, -1), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y.reshape(x.shape), ()

  def loss(x, weights):
    return lax.scan(layer, x, weights, unroll=unroll)[0].sum()

  return jax.value_and_grad(loss, (0, 1))


LAYERS = floats(32, 16), (floats(7, 16, 16), floats(7, 3, 3, 16, 16))


@pytest.fixture(scope="module")
def scanned():
  return text_of(layers(1), *LAYERS)


def test_the_arithmetic_of_a_scan_is_that_of_its_steps_one_after_the_other(scanned):
  found, wanted = cost_of(scanned), cost_of(text_of(layers(True), *LAYERS))
  assert " while(" in scanned and not found.loops and not wanted.loops
  assert found.flops == wanted.flops
  # Products of 7 layers forwards and twice backwards; a kernel of 3 x 3 sees 10 of 12 on an edge.
  assert wanted.flops == 3 * 7 * 2 * (32 * 16 * 16 + 2 * 10 * 10 * 16 * 16)
  # A scan stacks and slices what unrolled steps hold anyway.
  assert wanted.bytes / 2 < found.bytes < 3 * wanted.bytes


def test_how_often_a_loop_runs_is_found_where_the_compiler_does_not_say_it(scanned):
  """As libtpu: the counter is followed."""
  silent, count = re.subn(r'"known_trip_count":\{"n":"\d+"\},?', "", scanned)
  assert count
  assert cost_of(silent) == cost_of(scanned)


def test_a_loop_whose_end_only_the_data_know_is_counted_once_and_told():
  def run(x):
    return lax.while_loop(lambda x: x.sum() < 1e6, lambda x: x @ x, x)

  cost = cost_of(text_of(run, floats(8, 8)))
  assert (cost.flops, cost.loops) == (2 * 8**3, 1)


def test_loops_within_loops_are_multiplied():
  def run(x):
    return lax.fori_loop(0, 5, lambda i, x: lax.fori_loop(2, 11, lambda j, x: x @ x, x), x)

  text = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text_of(run, floats(8, 8)))
  assert cost_of(text).flops == 5 * 9 * 2 * 8**3


def test_of_branches_the_dearest_counts():
  def run(which, x):
    return lax.switch(which, [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x], x)

  assert cost_of(text_of(run, shaped((), jnp.int32), floats(8, 8))).flops == 2 * 2 * 8**3


CONVOLUTIONS = {
  "padded": {"padding": [(1, 1), (2, 0)]},
  "strided": {"window_strides": (2, 3), "padding": "SAME"},
  "transposed": {"lhs_dilation": (2, 2), "padding": [(2, 2), (1, 2)]},
  "dilated": {"rhs_dilation": (2, 1), "padding": "SAME"},
  "grouped": {"feature_group_count": 4},
  "batches": {"batch_group_count": 2},
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_are_counted_as_xla_counts_them(kind):
  options = {"window_strides": (1, 1), "padding": "VALID"} | CONVOLUTIONS[kind]
  inputs = 8 // options.get("feature_group_count", 1)

  def run(x, kernel):
    return lax.conv_general_dilated(
      x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)

  lowered = jax.jit(run).lower(floats(4, 9, 10, 8), floats(3, 3, inputs, 8))
  found = cost_of(lowered.compiler_ir("hlo").as_hlo_text())
  assert found.flops == lowered.cost_analysis()["flops"] > 0


def test_memory_traffic_without_loops_is_what_xla_says():
  def run(x, table, rows):
    block = lax.dynamic_slice(table, (rows[0], 0), (4, 64)) @ x
    return jnp.tanh(x.sum(0) + 1), lax.dynamic_update_slice(table, block, (rows[1], 0))

  arguments = floats(64, 64), floats(4096, 64), shaped((16,), jnp.int32)
  compiled = jax.jit(run, donate_argnums=1).lower(*arguments).compile()
  found = cost_of(compiled.as_text()).bytes
  assert found == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=0.1)
  assert found < 4096 * 64 * 4  # the table is neither read nor written whole


def on_tpu(result, given):
  return cost_of(f"""
ENTRY %main (p: f32[8,5]) -> f32[8,5] {{
  %p = f32[8,5]{{1,0:T(8,128){given}}} parameter(0)
  ROOT %n = f32[8,5]{{1,0:T(8,128){result}}} negate(%p)
}}
""").bytes


def test_tiles_are_read_whole_and_memory_on_the_chip_is_free():
  tile = 8 * 128 * 4
  assert (on_tpu("", ""), on_tpu("S(1)", ""), on_tpu("S(1)", "S(1)")) == (2 * tile, tile, 0)


def test_collectives_are_read_from_a_compiled_program():
  """Each once: not its end, nor the further parts that it is cut into for a TPU."""
  text = """
%part (q: f32[8]) -> f32[16] {
  %q = f32[8]{0} parameter(0)
  ROOT %more = f32[16]{0} all-gather(%q), frontend_attributes={chain_id="0"}
}

%first (r: f32[8]) -> (f32[8], f32[16]) {
  %r = f32[8]{0} parameter(0)
  %cut = f32[16]{0} all-gather(%r), frontend_attributes={chain_id="0"}
  ROOT %call = (f32[8]{0}, f32[16]{0}) custom-call(%cut), custom_call_target="AsyncCollectiveStart"
}

ENTRY %main (p: f32[1,64]) -> f32[3] {
  %p = f32[1,64]{1,0} parameter(0)
  %ag = f32[8,64]{1,0:T(8,128)} all-gather(%p), channel_id=1
  %ar = (f32[], bf16[4,2]{1,0}) all-reduce(%a, %b), channel_id=2
  %as = (f32[4]{0}, f32[16]{0}) all-gather-start(%x), channel_id=3
  %ad = f32[16]{0} all-gather-done(%as)
  %f = (f32[8]{0}, f32[16]{0}) fusion(%p), kind=kLoop, calls=%first
  %g = f32[16]{0} fusion(%p), kind=kLoop, calls=%part
  ROOT %not = f32[3]{0} add(%ag, %ar)
}
"""
  assert collectives_of(text) == [
    Collective("all-gather", 2048, 1, 2048), Collective("all-reduce", 20, 2, 16),
    Collective("all-gather", 64, 1, 64), Collective("all-gather", 64, 1, 64)]


def test_attention_of_cudnn_costs_what_its_products_do():
  """XLA cannot look into it and counts nothing."""
  half = [shaped((2, n, 4, 16), jnp.bfloat16) for n in (32, 64, 64)]

  def text(platform):
    def loss(*x):
      return dot_product_attention(*x, None, platform).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*half)
    with answered_as_hopper():
      lowered = traced.lower(lowering_platforms=("cuda" if platform.name == "gpu" else "cpu",))
    return lowered.compiler_ir("hlo").as_hlo_text()

  with answered_as_hopper():
    found = text(Platform("gpu", (9, 0)))
  assert "__cudnn$fmhaSoftmaxBackward" in found and not re.search(r"\bdot\(", found)
  scores = 2 * 4 * 32 * 64 * 16
  cost = cost_of(found)
  # Two products forwards, five backwards; plain, the scores are not formed again.
  assert (cost.flops, cost.calls) == (7 * 2 * scores, {})
  assert cost_of(text(Platform("gpu"))).flops == 6 * 2 * scores


@contextlib.contextmanager
def answered_as_hopper():
  answers = {
    "check_cudnn_version": lambda: 91100,
    "check_compute_capability": lambda asked: (9, 0) >= tuple(map(int, asked.split("."))),
    "is_cuda_compute_capability_equal": lambda asked: False,
  }
  with pytest.MonkeyPatch.context() as patch:
    for name, answer in answers.items():
      patch.setattr(cudnn, name, answer)
    yield


@pytest.mark.parametrize("call, flops", [
  # As XLA writes them for GPUs, and a kernel of Pallas.
  ('f32[8,4]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", '
   'backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
   '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}', 2 * 8 * 16 * 4),
  ('f32[8,4]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="tpu_custom_call", '
   'backend_config={"custom_call_config":{"cost_estimate":{"flops":"123","bytes_accessed":"9"}}}',
   123),
  ('f32[8,4]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="mine"', None),
])
def test_calls_of_libraries_count_or_are_named(call, flops):
  cost = cost_of(f"""
ENTRY %main (a: f32[8,16], b: f32[16,4]) -> f32[8,4] {{
  %a = f32[8,16]{{1,0}} parameter(0)
  %b = f32[16,4]{{1,0}} parameter(1)
  ROOT %c = ({call}
}}
""")
  assert (cost.flops, dict(cost.calls)) == ((0, {"mine": 1}) if flops is None else (flops, {}))
