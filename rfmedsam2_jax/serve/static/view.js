// The canvas: a slice, its labels and the prompts on it, in the proportions of the patient.

let colours = ["#ffffff"]; // of the labels 1, 2 ...; the server has them
export const setColours = (those) => { colours = those; };
export const colourOf = (label) => colours[(label - 1) % colours.length];

const channels = (label) => [1, 3, 5].map((at) => parseInt(colourOf(label).slice(at, at + 2), 16));

export class View {
  constructor(canvas) {
    this.canvas = canvas;
    this.picture = document.createElement("canvas");
    this.volume = null;
  }

  show(volume, image, labels, opacity) {
    this.volume = volume;
    const { rows, columns } = volume;
    this.picture.width = columns;
    this.picture.height = rows;
    const data = new ImageData(columns, rows);
    for (let at = 0; at < image.length; at += 1) {
      const label = labels ? labels[at] : 0;
      const colour = label ? channels(label) : null;
      for (let c = 0; c < 3; c += 1) {
        data.data[4 * at + c] = colour
          ? image[at] * (1 - opacity) + colour[c] * opacity : image[at];
      }
      data.data[4 * at + 3] = 255;
    }
    this.picture.getContext("2d").putImageData(data, 0, 0);
  }

  // Where the picture lies on the canvas, in pixels of the canvas.
  frame() {
    const { canvas, volume } = this;
    const width = volume.columns * volume.column_mm;
    const height = volume.rows * volume.row_mm;
    const scale = Math.min(canvas.width / width, canvas.height / height);
    return {
      x: (canvas.width - width * scale) / 2, y: (canvas.height - height * scale) / 2,
      w: width * scale, h: height * scale,
    };
  }

  // Coronal and sagittal slices have the feet first; a picture has the head on top.
  get flipped() { return this.volume.plane !== "axial"; }

  // Voxel (x, y), the middle of the first being 0, of a place on the page; kept inside.
  voxel(event) {
    const { columns, rows } = this.volume;
    const bounds = this.canvas.getBoundingClientRect();
    const ratio = this.canvas.width / bounds.width;
    const f = this.frame();
    const x = (((event.clientX - bounds.left) * ratio - f.x) / f.w) * columns - 0.5;
    let y = (((event.clientY - bounds.top) * ratio - f.y) / f.h) * rows - 0.5;
    if (this.flipped) y = rows - 1 - y;
    const inside = (v, n) => Math.min(Math.max(Math.round(v), 0), n - 1);
    return [inside(x, columns), inside(y, rows)];
  }

  place(x, y) {
    const { columns, rows } = this.volume;
    const f = this.frame();
    const down = this.flipped ? rows - 1 - y : y;
    return [f.x + ((x + 0.5) / columns) * f.w, f.y + ((down + 0.5) / rows) * f.h];
  }

  // `cross`: a voxel (x, y) whose row and column are marked.
  draw(prompts, dragged, cross = null) {
    const { canvas } = this;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio));
    canvas.height = Math.max(1, Math.round(canvas.clientHeight * ratio));
    if (!this.volume) return;
    const pen = canvas.getContext("2d");
    const f = this.frame();
    pen.save();
    if (this.flipped) {
      pen.translate(0, 2 * f.y + f.h);
      pen.scale(1, -1);
    }
    pen.imageSmoothingEnabled = false;
    pen.drawImage(this.picture, f.x, f.y, f.w, f.h);
    pen.restore();
    for (const prompt of dragged ? [...prompts, dragged] : prompts) this.mark(pen, prompt, ratio);
    if (cross) this.cross(pen, cross, ratio);
  }

  cross(pen, { x, y }, ratio) {
    const [left, top] = this.place(x, y);
    const f = this.frame();
    pen.strokeStyle = "#ffffff88";
    pen.lineWidth = ratio;
    pen.beginPath();
    pen.moveTo(f.x, top);
    pen.lineTo(f.x + f.w, top);
    pen.moveTo(left, f.y);
    pen.lineTo(left, f.y + f.h);
    pen.stroke();
  }

  mark(pen, { label, box, points = [], line, inside, mask }, ratio) {
    pen.strokeStyle = pen.fillStyle = colourOf(label);
    pen.lineWidth = 2 * ratio;
    if (mask) this.fill(pen, mask);
    if (line) {
      pen.setLineDash(inside ? [] : [6 * ratio, 4 * ratio]);
      pen.beginPath();
      for (const [x, y] of line) pen.lineTo(...this.place(x, y));
      pen.stroke();
      pen.setLineDash([]);
    }
    if (box) {
      // Around the voxels of both corners: they belong to the box.
      const [x0, y0] = this.place(box[0] - 0.5, box[1] - 0.5);
      const [x1, y1] = this.place(box[2] + 0.5, box[3] + 0.5);
      pen.strokeRect(Math.min(x0, x1), Math.min(y0, y1), Math.abs(x1 - x0), Math.abs(y1 - y0));
    }
    for (const [x, y, yes] of points) {
      const [left, top] = this.place(x, y);
      pen.beginPath();
      pen.arc(left, top, 6 * ratio, 0, 2 * Math.PI);
      pen.fill();
      pen.strokeStyle = "#fff";
      pen.beginPath(); // + inside, - outside
      pen.moveTo(left - 4 * ratio, top);
      pen.lineTo(left + 4 * ratio, top);
      if (yes) {
        pen.moveTo(left, top - 4 * ratio);
        pen.lineTo(left, top + 4 * ratio);
      }
      pen.stroke();
    }
  }

  // The voxels of a mask in the colour that the pen has.
  fill(pen, mask) {
    const { columns } = this.volume;
    pen.globalAlpha = 0.6;
    for (let at = 0; at < mask.length; at += 1) {
      if (!mask[at]) continue;
      const x = at % columns;
      const y = Math.floor(at / columns);
      const [x0, y0] = this.place(x - 0.5, y - 0.5);
      const [x1, y1] = this.place(x + 0.5, y + 0.5);
      pen.fillRect(x0, Math.min(y0, y1), x1 - x0, Math.abs(y1 - y0));
    }
    pen.globalAlpha = 1;
  }
}
