// Prompts of all labels in rounds: what is set after a tracking corrects it.
// A prompt here is { label, slice, round } and one of box: [x0, y0, x1, y1], points: [[x, y, inside]],
// line: [[x, y], ...] with inside, mask: bytes of a slice.

import { voxelAt } from "./planes.js";

export class Prompts {
  constructor() {
    this.list = [];
    this.tracked = 0; // rounds that the result on the screen has
  }

  add(label, slice, what) {
    // What stands beside a mask on another slice corrects what is followed from the mask.
    const masked = !what.mask && this.list.some((p) => p.mask && p.label === label
      && p.slice !== slice && p.round === this.tracked);
    const round = this.tracked + (masked ? 1 : 0);
    const here = (p) => p.label === label && p.slice === slice && p.round === round;
    if (what.mask) this.list = this.list.filter((p) => !here(p)); // it counts alone
    else this.list = this.list.filter((p) => !(here(p) && (p.mask || (p.box && what.box))));
    this.list.push({ label, slice, round, ...what });
  }

  // The mask that is drawn for a label on a slice, if there is one.
  mask(label, slice) {
    return this.list.find((p) => p.mask && p.label === label && p.slice === slice
      && p.round === this.tracked)?.mask;
  }

  undo() { return this.list.pop(); }

  // Called with the prompts that a tracking has finished.
  done(sent) {
    this.tracked = Math.max(...sent.map((p) => p.round)) + 1;
  }

  // For the server: canonical (z, y, x), placed by the plane.
  asked(plane, columns) {
    return this.list.map(({ label, round, slice, box, points, line, inside, mask }) => {
      const place = (x, y) => voxelAt(plane, slice, x, y);
      return {
        label, round,
        ...(box && { box: [place(box[0], box[1]), place(box[2], box[3])] }),
        ...(points && { points: points.map(([x, y, yes]) => [...place(x, y), yes]) }),
        ...(line && { lines: [{ path: line.map(([x, y]) => place(x, y)), inside }] }),
        ...(mask && { mask: rows(mask, columns).map(([y, x0, x1]) => [place(x0, y), place(x1, y)]) }),
      };
    });
  }
}

// Runs of a mask: [row, first column, last column].
function rows(mask, columns) {
  const found = [];
  for (let at = 0; at < mask.length; at += 1) {
    if (!mask[at]) continue;
    const y = Math.floor(at / columns);
    const first = at % columns;
    let last = first;
    while (last + 1 < columns && mask[y * columns + last + 1]) last += 1;
    found.push([y, first, last]);
    at = y * columns + last;
  }
  return found;
}

// A disc of a brush on a mask of a slice; `value` 0 takes away.
export function dab(mask, { rows: height, columns }, [x, y], radius, value) {
  const r = Math.ceil(radius);
  for (let v = Math.max(0, y - r); v <= Math.min(height - 1, y + r); v += 1) {
    for (let u = Math.max(0, x - r); u <= Math.min(columns - 1, x + r); u += 1) {
      if ((u - x) ** 2 + (v - y) ** 2 <= radius ** 2) mask[v * columns + u] = value;
    }
  }
}
