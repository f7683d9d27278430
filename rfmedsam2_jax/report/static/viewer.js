"use strict";
// The viewer of one case. `reportCase` (volumes/CASE.js) has the layers as NIfTI in base64, names and
// colours of the labels, and what the model said of each slice; NiiVue draws them.

const { Niivue, NVImage, SLICE_TYPE, SHOW_RENDER, DRAG_MODE } = window.niivue;
const $ = (id) => document.getElementById(id);
const PLANES = [
  ["All planes", SLICE_TYPE.MULTIPLANAR], ["Axial", SLICE_TYPE.AXIAL],
  ["Coronal", SLICE_TYPE.CORONAL], ["Sagittal", SLICE_TYPE.SAGITTAL], ["3D", SLICE_TYPE.RENDER],
];
const AXES = ["sagittal", "coronal", "axial"];

const say = (text) => { $("message").textContent = text; };

function labelColours(labels) {
  const part = (i) => [0, ...labels.map((label) => label.colour[i])];
  return {
    R: part(0), G: part(1), B: part(2), A: [0, ...labels.map(() => 255)],
    I: [0, ...labels.map((_, i) => i + 1)], labels: ["", ...labels.map((label) => label.name)],
  };
}

async function volumeOf(layer, content) {
  const options = { base64: layer.data, name: `${layer.title}.nii.gz`, opacity: 0 };
  if (layer.kind === "image") {
    const [cal_min, cal_max] = content.window;
    return NVImage.loadFromBase64({ ...options, colormap: "gray", opacity: 1, cal_min, cal_max });
  }
  if (layer.kind === "iou") {  // 1 + per cent
    return NVImage.loadFromBase64({ ...options, colormap: "viridis", cal_min: 0, cal_max: 101 });
  }
  const volume = await NVImage.loadFromBase64(options);
  volume.setColormapLabel(labelColours(content.labels));
  return volume;
}

function radios(nv) {
  const buttons = PLANES.map(([title, plane]) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = title;
    button.setAttribute("role", "radio");
    button.addEventListener("click", () => choose(plane));
    $("planes").append(button);
    return [button, plane];
  });
  function choose(plane) {
    nv.setSliceType(plane);
    for (const [button, its] of buttons) button.setAttribute("aria-checked", String(its === plane));
  }
  choose(SLICE_TYPE.MULTIPLANAR);
}

function switches(nv, layers) {
  const boxes = layers.map((layer, index) => {
    const label = document.createElement("label");
    const box = document.createElement("input");
    box.type = "checkbox";
    box.checked = index < 2;
    box.disabled = layer.title === "no image";
    box.dataset.layer = layer.title;
    label.append(box, layer.title);
    $("layers").append(label);
    box.addEventListener("change", show);
    return box;
  });
  function show() {
    const opacity = Number($("opacity").value);
    layers.forEach((layer, index) => {
      const whole = ["image", "boxes"].includes(layer.kind) || layer.title === "reference";
      nv.volumes[index].opacity = boxes[index].checked ? (whole ? 1 : opacity) : 0;
    });
    nv.updateGLVolume();
    document.body.dataset.shown = String(Number(document.body.dataset.shown ?? 0) + 1);
  }
  $("opacity").addEventListener("input", show);
  show();
}

// The reference as the border of its structures in the slices that were refined, so that the
// prediction is seen through it.
function outlines(nv, content) {
  const index = content.layers.findIndex((layer) => layer.title === "reference");
  $("outline-choice").hidden = index < 0;
  if (index < 0) return;
  const volume = nv.volumes[index];
  const filled = volume.img;
  const [nx, ny, nz] = volume.hdr.dims.slice(1, 4);
  const steps = [1, nx, nx * ny].filter((_, axis) => axis !== content.axis);
  const border = filled.slice();
  for (let i = 0; i < nx * ny * nz; i++) {
    if (filled[i] && steps.every((s) => filled[i - s] === filled[i] && filled[i + s] === filled[i])) {
      border[i] = 0;
    }
  }
  const show = () => {
    volume.img = $("outline").checked ? border : filled;
    nv.updateGLVolume();
  };
  $("outline").addEventListener("change", show);
  show();
}

function windowing(nv, content) {
  const fields = [$("low"), $("high")];
  if (content.layers[0].title === "no image") {
    $("windows").hidden = true;
    return;
  }
  const rounded = (value) => Number(value.toPrecision(4));
  fields.forEach((field, i) => { field.value = rounded(content.window[i]); });
  fields.forEach((field) => field.addEventListener("change", () => {
    const [low, high] = fields.map((one) => Number(one.value));
    if (!(low < high)) return;
    Object.assign(nv.volumes[0], { cal_min: low, cal_max: high });
    nv.updateGLVolume();
  }));
  nv.onIntensityChange = (volume) => {
    if (volume !== nv.volumes[0]) return;
    fields[0].value = rounded(volume.cal_min);
    fields[1].value = rounded(volume.cal_max);
  };
}

function readout(nv, content) {
  const { axis, factors, slices } = content;
  const side = nv.volumes[0].hdr.dims[axis + 1];
  const text = (value) => (value === null || value === undefined ? "–" : value.toFixed(3));
  return (location) => {
    // NiiVue counts to the right, front and head; the layers' voxels run to the left, back and head.
    const along = Math.round(location.vox[axis]);
    const slice = axis === 2 ? along : side - 1 - along;
    const ofFile = slices.flipped ? slices.count - 1 - slice * factors[axis] : slice * factors[axis];
    const here = content.layers
      .map((layer, i) => [layer, location.values[i]?.value])
      .filter(([layer, value]) => layer.kind === "labels" && value)
      .map(([layer, value]) => content.labels[Math.round(value) - 1]?.name);
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    for (const title of [`${AXES[axis]} slice ${ofFile}`,
                         "pred. IoU", "presence"]) {
      head.insertCell().textContent = title;
    }
    const body = table.createTBody();
    for (const label of content.labels) {
      const said = label.slices[slice];
      if (!said && !here.includes(label.name)) continue;
      const row = body.insertRow();
      row.className = here.includes(label.name) ? "here" : "";
      const name = row.insertCell();
      const mark = document.createElement("i");
      mark.style.background = `rgb(${label.colour.join(",")})`;
      name.append(mark, label.name);
      for (const value of said ?? [null, null]) row.insertCell().textContent = text(value);
    }
    $("readout").replaceChildren(table);
  };
}

function remarks(content) {
  const said = [];
  if (content.factors.some((factor) => factor > 1)) {
    const parts = content.factors.map((f, i) => [f, "xyz"[i]]).filter(([f]) => f > 1)
      .map(([f, axis]) => `1 of ${f} voxels along ${axis}`);
    said.push(`Thinned for the page: ${parts.join(", ")}. Scores and volumes are of all voxels.`);
  }
  if (!content.exact) said.push("Intensities are rounded to 16 bits here.");
  $("remarks").textContent = said.join(" ");
}

async function start() {
  const content = window.reportCase;
  if (!content) return say("The volumes of this case are missing: volumes/ has to lie beside cases/.");
  say("Reading the volumes …");
  remarks(content);
  const nv = window.viewer = new Niivue({
    backColor: [0, 0, 0, 1], crosshairColor: [1, 1, 1, 0.5], crosshairWidth: 0.2,
    crosshairWidthUnit: "percent",
    isRadiologicalConvention: true, sagittalNoseLeft: true, multiplanarShowRender: SHOW_RENDER.ALWAYS,
    dragAndDropEnabled: false, dragMode: DRAG_MODE.contrast, show3Dcrosshair: true, logLevel: "error",
  });
  await nv.attachToCanvas($("canvas"));
  for (const layer of content.layers) {
    nv.addVolume(await volumeOf(layer, content));
    layer.data = "";  // NiiVue has it now
  }
  nv.onLocationChange = readout(nv, content);
  windowing(nv, content);
  switches(nv, content.layers);
  radios(nv);
  outlines(nv, content);
  nv.scene.crosshairPos = nv.mm2frac(content.start);
  nv.drawScene();
  nv.createOnLocationChange();
  say("");
  document.body.dataset.ready = "yes";
}

start().catch((error) => {
  say(`The volumes cannot be shown: ${error.message ?? error}. A browser with WebGL 2 is needed.`);
  console.error(error);
});
