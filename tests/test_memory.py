"""The memory bank: which slices are remembered, in which row, at which position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rfmedsam2_jax.nn import memory_bank as memory


def table_of(live, reach=3, anchors=1, score=None, given=None, max_given=0, **options):
  score = np.zeros(live.shape, np.float32) if score is None else score
  given = np.zeros(live.shape, bool) if given is None else given

  @jax.jit
  def table(score, live, given):
    chosen = memory.anchor_slices(score, live, given, anchors, max_given)
    return memory.neighbour_slots(live, reach, *chosen, **options)

  return jax.tree.map(np.asarray, table(score, live, given))


def remembered(table, track, at):
  """The valid slots of a cell as a sorted list of (slice, row, offset)."""
  slots = zip(*(x[track, at] for x in table), strict=True)
  return sorted((int(z), int(row), int(offset)) for z, row, offset, valid in slots if valid)


def test_pointer_positions_are_signed_distances_over_the_true_depth():
  offsets = jnp.array([-3, 0, 2])
  np.testing.assert_allclose(memory.pointer_positions(offsets, 10), np.array([-3, 0, 2]) / 9)
  np.testing.assert_allclose(memory.pointer_positions(offsets, 16), np.array([-3, 0, 2]) / 15)
  np.testing.assert_allclose(memory.pointer_positions(offsets, 300), np.array([-3, 0, 2]) / 15)
  assert np.isfinite(memory.pointer_positions(offsets, 1)).all()
  per_volume = memory.pointer_positions(jnp.ones((2, 1)), jnp.array([[5], [11]]))
  np.testing.assert_allclose(per_volume, [[1 / 4], [1 / 10]])


def test_neighbours_are_the_live_slices_within_reach_without_the_own_one():
  live = np.array([[1, 1, 1, 0, 1, 1, 1, 1, 0, 0]], bool)
  table = table_of(live, anchors=0)
  # (slice, |offset| - 1 on both sides, own minus other)
  assert remembered(table, 0, 0) == [(1, 0, -1), (2, 1, -2)]
  assert remembered(table, 0, 4) == [(1, 2, 3), (2, 1, 2), (5, 0, -1), (6, 1, -2), (7, 2, -3)]
  assert remembered(table, 0, 9) == [(6, 2, 3), (7, 1, 2)]
  assert remembered(table_of(live, anchors=0, reach=1), 0, 4) == [(5, 0, -1)]
  assert not table_of(live, anchors=0, reach=0).valid.any()


def test_the_anchor_is_the_best_live_slice_and_takes_the_conditioning_row():
  live = np.array([[1, 1, 1, 1, 1, 1, 1, 1, 0, 0]] * 2, bool)
  score = np.zeros(live.shape, np.float32)
  score[0, [1, 5]] = 0.4, 0.7
  score[0, 9] = 0.9  # best, but not live
  score[1, 2] = 0.1
  table = table_of(live, score=score)
  assert (5, 6, -5) in remembered(table, 0, 0)
  assert (2, 6, 5) in remembered(table, 1, 7)
  assert len(remembered(table, 0, 0)) == 4
  # Never the own slice.
  assert all(row != 6 for _, row, _ in remembered(table, 0, 5))
  two = remembered(table_of(live, score=score, anchors=2), 0, 7)
  assert [slot for slot in two if slot[1] == 6] == [(1, 6, 6), (5, 6, 2)]
  none = table_of(live, score=score, anchors=0)
  assert (none.rows[none.valid] < 6).all()


def test_a_track_without_live_slices_remembers_nothing():
  assert not table_of(np.zeros((1, 6), bool), anchors=2).valid.any()


def test_a_slice_that_is_an_anchor_and_a_neighbour_is_read_once_as_an_anchor():
  live = np.ones((2, 10), bool)
  live[1, 4] = False
  score, given = np.zeros(live.shape, np.float32), np.zeros(live.shape, bool)
  score[:, 4] = 0.9  # live in the first track alone
  score[1, 0], given[:, 5] = 0.5, True
  table = table_of(live, score=score, given=given, max_given=1)
  assert remembered(table, 0, 6) == [
    (3, 2, 3), (4, 6, 2), (5, 6, 1), (7, 0, -1), (8, 1, -2), (9, 2, -3)]
  assert remembered(table, 0, 4) == [
    (1, 2, 3), (2, 1, 2), (3, 0, 1), (5, 6, -1), (6, 1, -2), (7, 2, -3)]
  assert remembered(table, 1, 6) == [
    (0, 6, 6), (3, 2, 3), (5, 6, 1), (7, 0, -1), (8, 1, -2), (9, 2, -3)]
  for track in range(2):
    for at in range(10):
      slices = [slot[0] for slot in remembered(table, track, at)]
      assert len(set(slices)) == len(slices)


def test_given_slices_are_further_anchors():
  live = np.ones((2, 8), bool)
  score = np.linspace(0, 1, 16, dtype=np.float32).reshape(2, 8)
  given = np.zeros_like(live)
  given[0, [0, 2]] = True
  for anchors in (0, 1):
    table = table_of(live, score=score, given=given, anchors=anchors, max_given=2)
    rows = [slot[0] for slot in remembered(table, 0, 4) if slot[1] == 6]
    assert rows == [0, 2, *([7] if anchors else [])]
    # A track without given slices does not get more anchors for it.
    rows = [slot[0] for slot in remembered(table, 1, 4) if slot[1] == 6]
    assert rows == ([7] if anchors else [])


def test_ten_slices_in_a_bucket_of_sixteen_remember_what_ten_slices_do():
  live = np.random.default_rng(0).random((3, 10)) < 0.7
  score = np.random.default_rng(1).random((3, 10)).astype(np.float32)
  exact = table_of(live, score=score)
  inside = np.arange(16) < 10
  padded = lambda x, value: np.pad(x, [(0, 0), (0, 6)], constant_values=value)  # noqa: E731
  bucket = table_of(padded(live, True) & inside, score=padded(score, 2.0), inside=inside)
  for track in range(3):
    for at in range(10):
      assert remembered(bucket, track, at) == remembered(exact, track, at)
  # Padding is never remembered, even if somebody says it is live.
  careless = table_of(padded(live, True), anchors=0, inside=inside)
  assert (careless.slices[careless.valid] < 10).all()


@pytest.mark.parametrize("start", [0, 7, 23])
def test_the_bank_reads_what_the_official_dictionaries_hold(start):
  """Forward to the end, then back from the start, with some slices left out.

  The reference keeps every slice in a dictionary, as sam2_base.py:520-640 does. Masks are read of
  the slice just behind, unless the object was absent there, as the second one sometimes is.
  """
  depth, skipped = 24, {start + 4, start + 7, start - 3, start - 20}
  absent = {start + 2, start - 6}
  add = jax.jit(memory.add_recent)
  read, mask_before = jax.jit(memory.read), jax.jit(memory.mask_before)
  bank = memory.empty_bank(2, 1, grid=1, mem_dim=1, d_model=1, masks=True)
  at = lambda z: np.full(2, z, np.int32)  # noqa: E731
  value = lambda z, ndim: np.full((2,) + (1,) * ndim, z, np.float32)  # noqa: E731
  bank = memory.add_conditioning(
    bank, at(0), jnp.array([True, True]), value(start, 3), value(start, 1), at(start),
    value(start, 2) * np.ones((4, 4)),
  )
  others = {}
  for reverse in (False, True):
    sign = 1 if reverse else -1
    for z in range(start - 1, -1, -1) if reverse else range(start + 1, depth):
      expected = [(start, 6)]
      expected += [(t, n - 1) for n in range(1, 7) if (t := z + sign * n) in others]
      pointers = [(start, (start - z) * sign)]
      pointers += [(t, n) for n in range(1, 16) if (t := z + sign * n) in others]
      slots = jax.tree.map(np.asarray, read(bank, at(z), depth, reverse))
      for track in range(2):
        valid, heard = slots.valid[track], slots.pointer_valid[track]
        maps = slots.maps[track, :, 0, 0, 0][valid]
        rows = slots.rows[track][valid]
        assert sorted(zip(maps, rows, strict=True)) == sorted(expected)
        found = slots.pointers[track, :, 0][heard]
        places = slots.pointer_positions[track][heard] * 15
        assert sorted(zip(found, places.round(4), strict=True)) == sorted(pointers)
      before, has = jax.tree.map(np.asarray, mask_before(bank, at(z), reverse))
      there = z + sign == start or z + sign in others
      np.testing.assert_array_equal(has, [there, there and z + sign not in absent])
      assert (before[has] == z + sign).all()
      run = z not in skipped
      mask = value(z, 2) * np.ones((4, 4), np.float32)
      mask[1] = -1024 if z in absent else z
      bank = add(
        bank, np.full(2, run), value(z, 3), value(z, 1), at(z), at(start), reverse, mask
      )
      if run:
        others[z] = True


def test_no_shape_of_the_bank_depends_on_depth_and_tracks_are_apart():
  bank = memory.empty_bank(2, 1, grid=1, mem_dim=1, d_model=1)
  where, slices = jnp.array([True, False]), jnp.array([3, 4], jnp.int32)
  ones = jnp.ones((2, 1, 1, 1)), jnp.ones((2, 1))
  new = memory.add_recent(bank, where, *ones, slices, jnp.zeros(2, jnp.int32), False)
  assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, bank)
  slots = memory.read(new, slices + 1, 10, False)
  np.testing.assert_array_equal(slots.valid.any(axis=1), where)


def test_conditioning_slices_are_read_on_both_sides_their_pointers_only_from_behind():
  bank = memory.empty_bank(1, 2, grid=1, mem_dim=1, d_model=1)
  for slot, z in enumerate((2, 9)):
    bank = memory.add_conditioning(
      bank, jnp.array([slot]), jnp.array([True]), jnp.ones((1, 1, 1, 1)), jnp.ones((1, 1)),
      jnp.array([z]),
    )
  for reverse, heard in ((False, [3 / 15]), (True, [4 / 15])):
    slots = memory.read(bank, jnp.array([5]), 30, reverse)
    assert slots.rows[slots.valid].tolist() == [6, 6]
    np.testing.assert_allclose(slots.pointer_positions[slots.pointer_valid], heard, rtol=1e-6)
