// Boxes and points of all labels in rounds: what is set after a tracking corrects it.
// A prompt here is { label, slice, round, box: [x0, y0, x1, y1] } or { ..., points: [[x, y, inside]] }.

export class Prompts {
  constructor() {
    this.list = [];
    this.tracked = 0; // rounds that the result on the screen has
  }

  add(label, slice, what) {
    const round = this.tracked;
    if (what.box) { // one box per label, slice and round
      this.list = this.list.filter((p) => !(p.box && p.label === label && p.slice === slice
        && p.round === round));
    }
    this.list.push({ label, slice, round, ...what });
  }

  undo() { return this.list.pop(); }

  // Called with the prompts that a tracking has finished.
  done(sent) {
    this.tracked = Math.max(...sent.map((p) => p.round)) + 1;
  }

  // For the server: canonical (z, y, x), placed by the plane.
  asked(plane) {
    const place = {
      axial: (s, x, y) => [s, y, x],
      coronal: (s, x, y) => [y, s, x],
      sagittal: (s, x, y) => [y, x, s],
    }[plane];
    return this.list.map(({ label, round, slice, box, points }) => ({
      label, round,
      ...(box && { box: [place(slice, box[0], box[1]), place(slice, box[2], box[3])] }),
      ...(points && { points: points.map(([x, y, inside]) => [...place(slice, x, y), inside]) }),
    }));
  }
}
