// What the pointer does on the view: boxes, points, lines and masks become prompts.

import { dab } from "./prompts.js";

export class Tools {
  // page: { volume, slice, label, prompts, radius } as they are now, `busy`, and `changed()`.
  constructor(view, page) {
    this.view = view;
    this.page = page;
    this.name = "box";
    this.dragged = null; // what is being drawn, like a prompt
    const { canvas } = view;
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", () => this.up());
    canvas.addEventListener("pointercancel", () => { this.dragged = null; page.changed(); });
  }

  down(event) {
    const { page, view } = this;
    if (!page.volume || page.busy || event.button) return;
    const [x, y] = view.voxel(event);
    const { label } = page;
    if (this.name === "inside" || this.name === "outside") {
      page.prompts.add(label, page.slice, { points: [[x, y, this.name === "inside"]] });
      page.changed([x, y]);
      return;
    }
    view.canvas.setPointerCapture(event.pointerId);
    if (this.name === "box") this.dragged = { label, box: [x, y, x, y] };
    if (this.name === "line") this.dragged = { label, line: [[x, y]], inside: !event.shiftKey };
    if (this.name === "brush") {
      const { rows, columns } = page.volume;
      const mask = page.prompts.mask(label, page.slice)?.slice() ?? new Uint8Array(rows * columns);
      this.dragged = { label, mask, takes: event.shiftKey };
      this.paint([x, y]);
      page.changed();
    }
  }

  move(event) {
    const { dragged } = this;
    if (!dragged) return;
    const [x, y] = this.view.voxel(event);
    if (dragged.box) dragged.box.splice(2, 2, x, y);
    if (dragged.line) {
      const [u, v] = dragged.line[dragged.line.length - 1];
      if (u !== x || v !== y) dragged.line.push([x, y]);
    }
    if (dragged.mask) this.paint([x, y]);
    this.page.changed();
  }

  // From where the brush was to where it is, without gaps.
  paint([x, y]) {
    const { mask, takes, last = [x, y] } = this.dragged;
    const steps = Math.max(Math.abs(x - last[0]), Math.abs(y - last[1]), 1);
    for (let step = 0; step <= steps; step += 1) {
      const at = [0, 1].map((i) => Math.round(last[i] + (([x, y][i] - last[i]) * step) / steps));
      dab(mask, this.page.volume, at, this.page.radius, takes ? 0 : 1);
    }
    this.dragged.last = [x, y];
  }

  up() {
    const { dragged, page } = this;
    if (!dragged) return;
    this.dragged = null;
    const { label, box, line, inside, mask } = dragged;
    let middle = null;
    if (box && box[0] !== box[2] && box[1] !== box[3]) {
      const [x0, y0, x1, y1] = box;
      page.prompts.add(label, page.slice, {
        box: [Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)],
      });
      middle = [Math.round((x0 + x1) / 2), Math.round((y0 + y1) / 2)];
    }
    if (line) {
      page.prompts.add(label, page.slice, { line, inside });
      middle = line[Math.floor(line.length / 2)];
    }
    if (mask && mask.some((voxel) => voxel)) {
      page.prompts.add(label, page.slice, { mask });
      middle = dragged.last;
    }
    page.changed(middle);
  }
}
