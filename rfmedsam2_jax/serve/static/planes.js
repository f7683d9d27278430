// Planes of a volume: which axis of (z, y, x) a slice, a row and a column count.

export const PLANES = { axial: [0, 1, 2], coronal: [1, 0, 2], sagittal: [2, 0, 1] };

// What a view has to know of the slices of a plane.
export function slicesOf(volume, plane) {
  const [slice, row, column] = PLANES[plane];
  return {
    plane, slices: volume.zyx_shape[slice], rows: volume.zyx_shape[row],
    columns: volume.zyx_shape[column], row_mm: volume.zyx_spacing[row],
    column_mm: volume.zyx_spacing[column],
  };
}

// The voxel (z, y, x) at column x, row y of a slice, and back.
export function voxelAt(plane, number, x, y) {
  const place = [0, 0, 0];
  PLANES[plane].forEach((axis, at) => { place[axis] = [number, y, x][at]; });
  return place;
}
export const onPlane = (plane, place) => {
  const [slice, row, column] = PLANES[plane];
  return { number: place[slice], x: place[column], y: place[row] };
};
