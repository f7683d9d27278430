// The page: what a person does becomes prompts, and what the server found is shown.

import { onPlane, voxelAt } from "./planes.js";
import { Prompts } from "./prompts.js";
import * as server from "./server.js";
import { Sides } from "./sides.js";
import { Tools } from "./tools.js";
import { View, colourOf, setColours } from "./view.js";

const $ = (id) => document.getElementById(id);
const view = new View($("view"));
let prompts = new Prompts();
let volume = null; // what the server said when it was opened
let slice = 0;
let at = [0, 0]; // column and row through which the other planes are cut
let label = 1;
let job = null; // name of the tracking that runs
let found = false; // whether there is a result to save
let asked = 0; // of slices: only the latest answer is shown
let shown = null; // { image, labels, values } of the slice on the screen; values when asked for
let structures = []; // of the label map, { label, name }

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

async function attempt(action) {
  try {
    await action();
  } catch (error) {
    say(error.message, true);
  }
}

const opacity = () => Number($("opacity").value);
const radius = () => Number($("radius").value);
const nameOf = (value) => structures.find((s) => s.label === value)?.name ?? `label ${value}`;
const sides = new Sides([...$("sides").children], (place) => attempt(() => centre(place)));
const tools = new Tools(view, {
  get volume() { return volume; },
  get slice() { return slice; },
  get label() { return label; },
  get prompts() { return prompts; },
  get radius() { return radius(); },
  get busy() { return job !== null; },
  changed(middle) {
    if (middle) at = middle;
    if (tools.dragged) draw();
    else {
      list();
      attempt(() => beside());
    }
  },
});

function draw() {
  const drawn = prompts.list.filter((p) => p.slice === slice
    && !(tools.dragged?.mask && p.mask && p.label === label));
  view.draw(drawn, tools.dragged);
}

// The other planes through `at`; `again` if labels have changed.
async function beside(again = false) {
  if (!volume) return;
  await sides.show(volume, voxelAt(volume.plane, slice, ...at), opacity(), again);
}

// Goes to a voxel (z, y, x).
async function centre(place) {
  const there = onPlane(volume.plane, place);
  at = [there.x, there.y];
  await go(there.number);
}

const kindOf = (p) => (p.box && "box") || (p.mask && "mask")
  || (p.line ? "line" : "point") + ((p.line ? p.inside : p.points[0][2]) ? " inside" : " outside");

function list() {
  $("prompts").replaceChildren(...prompts.list.map((p) => {
    const item = document.createElement("li");
    item.style.borderColor = colourOf(p.label);
    item.textContent = `${p.label}: ${kindOf(p)}, slice ${p.slice}`
      + (p.round ? ` (correction ${p.round})` : "");
    return item;
  }));
  $("track").disabled = !prompts.list.length || job !== null;
  $("undo").disabled = !prompts.list.length || job !== null;
  $("cancel").disabled = job === null;
  $("save").disabled = !found;
  $("segment").disabled = $("ground").disabled = job !== null;
  $("take").disabled = !found || job !== null;
  draw();
}

function legend() {
  $("structures").replaceChildren(...structures.map((s) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = `${s.label}: ${s.name}`;
    button.style.borderColor = colourOf(s.label);
    button.setAttribute("aria-pressed", s.label === label);
    button.addEventListener("click", () => setLabel(s.label));
    item.append(button);
    return item;
  }));
}

// What the server says of the label map, after it has changed.
async function learn() {
  ({ structures } = await server.about(volume.volume));
  legend();
}

function paint() {
  if (!shown) return;
  view.show(volume, shown.image, shown.labels, opacity());
  draw();
}

// again: labels may have changed.
async function go(to, again = false) {
  if (!volume) return;
  slice = Math.min(Math.max(to, 0), volume.slices - 1);
  $("slice").value = slice;
  $("number").textContent = `${slice} of ${volume.slices - 1}`;
  asked += 1;
  const mine = asked;
  const { volume: key, plane } = volume;
  const [image, labels] = await Promise.all([
    server.image(key, slice, plane), server.labels(key, slice, plane), beside(again),
  ]);
  if (mine !== asked) return;
  shown = { image, labels, values: null };
  paint();
  $("view").dataset.slice = slice; // what is on the screen
}

async function open() {
  if (job) throw new Error("a tracking runs; cancel it or wait");
  const upload = $("upload").files[0];
  say("reading ...");
  const settings = { plane: $("plane").value, window: $("window").value || $("custom").value };
  if ($("series").value) settings.series = $("series").value;
  try {
    volume = upload ? await server.upload(upload, settings)
      : await server.open($("file").value, settings);
  } catch (error) {
    // A study of several, which the error lists.
    if (/choose one \(series\)/.test(error.message)) $("study").hidden = false;
    throw error;
  }
  prompts = new Prompts();
  found = false;
  ({ structures } = volume);
  legend();
  $("map").hidden = false;
  at = [Math.floor(volume.columns / 2), Math.floor(volume.rows / 2)];
  $("slice").max = volume.slices - 1;
  list();
  await go(Math.floor(volume.slices / 2));
  const next = "draw a box around a structure, or click points; then track";
  say(`${volume.name}: ${[...volume.warnings, next].join("; ")}`);
  $("view").focus();
}

// Waits for a job of the server; `then` what has to be done when it has ended well.
async function compute(answer, then) {
  job = answer.job;
  $("progress").hidden = false;
  list();
  try {
    await follow(then);
  } finally {
    job = null;
    $("progress").hidden = true;
    list();
  }
}

async function track() {
  if (!volume || job || !prompts.list.length) return;
  const sent = [...prompts.list];
  await compute(
    await server.track(volume.volume, prompts.asked(volume.plane, volume.columns)),
    (now) => {
      prompts.done(sent);
      return `tracked in ${now.seconds.toFixed(1)} s; scroll, correct what is wrong, or save`;
    },
  );
}

const CORRECT = "to correct a structure take its mask (K) on a good slice, then set points "
  + "where it is wrong; or draw its box anew";

async function segment() {
  if (!volume || job || $("models").hidden) return;
  await compute(await server.segment(volume.volume, $("model").value), (now) => {
    prompts = new Prompts();
    return `segmented in ${now.seconds.toFixed(1)} s; ${CORRECT}`;
  });
}

async function begin() {
  const file = $("ground").files[0];
  if (!volume || job || !file) return;
  say("reading ...");
  try {
    await server.begin(volume.volume, file);
  } finally {
    $("ground").value = "";
  }
  prompts = new Prompts();
  found = true;
  await learn();
  await go(slice, true);
  list();
  say(`${file.name}: ${CORRECT}`);
}

// The label's voxels on this slice become a mask prompt.
function take() {
  if (!shown || !found || job) return;
  const mask = shown.labels.map((value) => (value === label ? 1 : 0));
  if (!mask.some((voxel) => voxel)) throw new Error(`${nameOf(label)} is not on this slice`);
  prompts.add(label, slice, { mask });
  list();
}

function left(now) {
  const seconds = (now.seconds * (now.total - now.done)) / now.done;
  return now.done > 1 ? `, ${seconds < 90 ? `${Math.ceil(seconds)} s`
    : `${Math.ceil(seconds / 60)} min`} left` : "";
}

async function follow(then) {
  for (let fresh = 0; ;) {
    const now = await server.job(job);
    $("progress").max = now.total || 1;
    $("progress").value = now.done;
    if (now.fresh !== fresh || now.state === "cancelled") await go(slice, true);
    ({ fresh } = now);
    if (now.state === "done") {
      const text = then(now);
      found = true;
      await learn();
      await go(slice, true);
      say(text);
      return;
    }
    if (now.state === "failed") throw new Error(now.error);
    if (now.state === "cancelled") {
      say("cancelled; the result is the one before");
      return;
    }
    say(now.state === "queued" ? "waiting for the network ..." : now.message
      || `slice ${now.done}${now.total ? ` of ${now.total}` : ""}${left(now)}`);
    await new Promise((resolve) => { setTimeout(resolve, 200); });
  }
}

async function save() {
  const link = document.createElement("a");
  const kind = $("kind").value;
  link.href = URL.createObjectURL(await server.save(volume.volume, kind));
  const name = volume.name.split("/").pop().replace(/\.(nii|nii\.gz|nrrd|mha)$/, "");
  link.download = `${name}_labels.${kind}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  say(`saved ${link.download}`);
}

function undo() {
  if (job || !prompts.list.length) return;
  if (prompts.undo().round < prompts.tracked) {
    say(prompts.list.length ? "removed; track, and the result is without it"
      : "removed; the result stays until another prompt is tracked");
  }
  list();
}

function choose(group, button) {
  for (const other of group.children) {
    other.setAttribute("aria-checked", other === button);
    other.tabIndex = other === (button ?? group.firstChild) ? 0 : -1;
  }
}

function setLabel(value) {
  label = value;
  choose($("label"), $("label").children[value - 1]);
  legend();
}

function setTool(name) {
  tools.name = name;
  $("size").hidden = name !== "brush";
  choose($("tool"), $("tool").querySelector(`[data-tool=${name}]`));
}

function offer(value) {
  const button = document.createElement("button");
  button.type = "button";
  button.setAttribute("role", "radio");
  button.setAttribute("aria-label", `Label ${value}`);
  button.textContent = value;
  button.style.borderBottomColor = colourOf(value);
  button.addEventListener("click", () => setLabel(value));
  $("label").append(button);
}
setTool("box");

$("tool").addEventListener("click", (event) => {
  const button = event.target.closest("[data-tool]");
  if (button) setTool(button.dataset.tool);
});
$("open").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(open);
});
$("track").addEventListener("click", () => attempt(track));
$("cancel").addEventListener("click", () => attempt(() => server.cancel(job)));
$("save").addEventListener("click", () => attempt(save));
$("segment").addEventListener("click", () => attempt(segment));
$("take").addEventListener("click", () => attempt(take));
$("ground").addEventListener("change", () => attempt(begin));
$("undo").addEventListener("click", undo);
$("window").addEventListener("change", () => { $("other").hidden = $("window").value !== ""; });
$("opacity").addEventListener("input", () => {
  paint();
  if (volume) attempt(() => beside(true));
});
$("slice").addEventListener("input", () => attempt(() => go(Number($("slice").value))));
$("view").addEventListener("wheel", (event) => {
  event.preventDefault();
  attempt(() => go(slice + Math.sign(event.deltaY)));
}, { passive: false });
new ResizeObserver(draw).observe($("view"));


// Place, intensity and structure under the pointer.
$("view").addEventListener("pointermove", (event) => attempt(async () => {
  if (!shown || tools.dragged) return;
  const [x, y] = view.voxel(event);
  const slice_ = shown;
  slice_.values ??= server.values(volume.volume, slice, volume.plane);
  const values = await slice_.values;
  if (slice_ !== shown) return;
  const voxel = y * volume.columns + x;
  const value = shown.labels[voxel];
  $("where").textContent = `x ${x}, y ${y}, slice ${slice}: ${Number(values[voxel].toPrecision(6))}`
    + (value ? `, ${nameOf(value)}` : "");
}));
$("view").addEventListener("pointerleave", () => { $("where").textContent = ""; });

const KEYS = { // what each does, and what the page says of it
  b: [() => setTool("box"), "box"],
  p: [() => setTool("inside"), "point inside"],
  n: [() => setTool("outside"), "point outside"],
  l: [() => setTool("line"), "line; with Shift outside"],
  m: [() => setTool("brush"), "brush of a mask; with Shift takes away"],
  k: [take, "mask of the label on this slice"],
  t: [track, "track"],
  a: [segment, "segment with the model"],
  z: [undo, "undo the last prompt"],
  s: [() => (found ? save() : undefined), "save"],
  escape: [() => (job ? server.cancel(job) : undefined), "cancel"],
  arrowup: [() => go(slice + 1), "next slice"],
  arrowdown: [() => go(slice - 1), "slice before"],
  arrowright: [() => go(slice + 1), ""],
  arrowleft: [() => go(slice - 1), ""],
};
for (const [key, [, text]] of Object.entries(KEYS)) {
  if (text) {
    const [term, said] = ["dt", "dd"].map((tag) => document.createElement(tag));
    const shownKey = document.createElement("kbd");
    shownKey.textContent = key.replace("arrow", "arrow ").toUpperCase();
    term.append(shownKey);
    said.textContent = text;
    $("keys").append(term, said);
  }
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, select")) return;
  const key = event.key.toLowerCase();
  const action = key > "0" && key <= $("label").children.length && key.length === 1 ? () => setLabel(Number(key)) : KEYS[key]?.[0];
  if (!action) return;
  event.preventDefault();
  attempt(action);
});

attempt(async () => {
  const { checkpoint, files, colours, models } = await server.start();
  setColours(colours);
  colours.forEach((colour, at) => offer(at + 1));
  setLabel(1);
  $("checkpoint").textContent = `checkpoint ${checkpoint}`;
  $("model").replaceChildren(...models.map((model) => new Option(model.name)));
  $("models").hidden = !models.length;
  $("file").replaceChildren(...files.map((name) => new Option(name)));
  $("file").disabled = !files.length;
  say(files.length ? "open a volume" : "upload a volume, or start the server with a folder of volumes");
  list();
});
