// The two planes that are not prompted, through one voxel; a click in one goes there.

import { PLANES, onPlane, slicesOf, voxelAt } from "./planes.js";
import * as server from "./server.js";
import { View } from "./view.js";

export class Sides {
  // goTo: called with the voxel (z, y, x) that was clicked.
  constructor(canvases, goTo) {
    this.views = canvases.map((canvas) => new View(canvas));
    this.views.forEach((view) => {
      view.canvas.addEventListener("pointerdown", (event) => {
        if (!view.volume) return;
        const { number } = onPlane(view.volume.plane, this.place);
        goTo(voxelAt(view.volume.plane, number, ...view.voxel(event)));
      });
      new ResizeObserver(() => this.draw()).observe(view.canvas);
    });
  }

  // Shows the slices through a voxel; `again` also those that are on the screen.
  async show(volume, place, opacity, again) {
    this.place = place;
    const planes = Object.keys(PLANES).filter((plane) => plane !== volume.plane);
    await Promise.all(planes.map((plane, at) => this.fetch(
      this.views[at], volume, plane, onPlane(plane, place).number, opacity, again,
    )));
    this.draw();
  }

  async fetch(view, volume, plane, number, opacity, again) {
    const wanted = `${volume.volume} ${number}`;
    if (view.wanted === wanted && !again) return; // on the screen, or on its way
    view.wanted = wanted;
    view.asked = (view.asked ?? 0) + 1;
    const mine = view.asked; // only the latest answer is shown
    const answer = await Promise.all([
      server.image(volume.volume, number, plane), server.labels(volume.volume, number, plane),
    ]);
    if (mine !== view.asked) return;
    view.show(slicesOf(volume, plane), ...answer, opacity);
    view.canvas.dataset.slice = number;
    view.canvas.title = plane;
  }

  draw() {
    for (const view of this.views) {
      view.draw([], null, view.volume && onPlane(view.volume.plane, this.place));
    }
  }
}
