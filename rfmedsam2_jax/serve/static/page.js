// The page: what a person does becomes prompts, and what the server found is shown.

import { Prompts } from "./prompts.js";
import * as server from "./server.js";
import { View, colourOf, setColours } from "./view.js";

const $ = (id) => document.getElementById(id);
const view = new View($("view"));
let prompts = new Prompts();
let volume = null; // what the server said when it was opened
let slice = 0;
let label = 1;
let tool = "box";
let dragged = null; // a box that is being drawn
let job = null; // name of the tracking that runs
let found = false; // whether there is a result to save
let asked = 0; // of slices: only the latest answer is shown
let shown = null; // { image, labels } of the slice on the screen

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

function draw() {
  view.draw(prompts.list.filter((p) => p.slice === slice), dragged);
}

function list() {
  $("prompts").replaceChildren(...prompts.list.map((p) => {
    const item = document.createElement("li");
    const what = p.box ? "box" : `point ${p.points[0][2] ? "inside" : "outside"}`;
    item.style.borderColor = colourOf(p.label);
    item.textContent = `${p.label}: ${what}, slice ${p.slice}`
      + (p.round ? ` (correction ${p.round})` : "");
    return item;
  }));
  $("track").disabled = !prompts.list.length || job !== null;
  $("undo").disabled = !prompts.list.length || job !== null;
  $("cancel").disabled = job === null;
  $("save").disabled = !found;
  draw();
}

function paint() {
  if (!shown) return;
  view.show(volume, shown.image, shown.labels, Number($("opacity").value));
  draw();
}

async function go(to) {
  if (!volume) return;
  slice = Math.min(Math.max(to, 0), volume.slices - 1);
  $("slice").value = slice;
  $("number").textContent = `${slice} of ${volume.slices - 1}`;
  asked += 1;
  const mine = asked;
  const { volume: key } = volume;
  const [image, labels] = await Promise.all([
    server.image(key, slice), server.labels(key, slice),
  ]);
  if (mine !== asked) return;
  shown = { image, labels };
  paint();
  $("view").dataset.slice = slice; // what is on the screen
}

async function open() {
  if (job) throw new Error("a tracking runs; cancel it or wait");
  const upload = $("upload").files[0];
  say("reading ...");
  const settings = [$("plane").value, $("window").value || $("custom").value];
  volume = upload ? await server.upload(upload, ...settings)
    : await server.open($("file").value, ...settings);
  prompts = new Prompts();
  found = false;
  $("slice").max = volume.slices - 1;
  list();
  await go(Math.floor(volume.slices / 2));
  const next = "draw a box around a structure, or click points; then track";
  say(`${volume.name}: ${[...volume.warnings, next].join("; ")}`);
  $("view").focus();
}

async function track() {
  if (!volume || job || !prompts.list.length) return;
  const sent = [...prompts.list];
  const answer = await server.track(volume.volume, prompts.asked(volume.plane));
  job = answer.job;
  $("progress").hidden = false;
  list();
  try {
    await follow(sent);
  } finally {
    job = null;
    $("progress").hidden = true;
    list();
  }
}

function left(now) {
  const seconds = (now.seconds * (now.total - now.done)) / now.done;
  return now.done > 1 ? `, ${seconds < 90 ? `${Math.ceil(seconds)} s`
    : `${Math.ceil(seconds / 60)} min`} left` : "";
}

async function follow(sent) {
  for (let fresh = 0; ;) {
    const now = await server.job(job);
    $("progress").max = now.total || 1;
    $("progress").value = now.done;
    if (now.fresh !== fresh || now.state === "cancelled") await go(slice);
    ({ fresh } = now);
    if (now.state === "done") {
      prompts.done(sent);
      found = true;
      await go(slice);
      say(`tracked in ${now.seconds.toFixed(1)} s; scroll, correct what is wrong, or save`);
      return;
    }
    if (now.state === "failed") throw new Error(now.error);
    if (now.state === "cancelled") {
      say("cancelled; the result is the one before");
      return;
    }
    say(now.state === "queued" ? "waiting for the network ..."
      : `slice ${now.done}${now.total ? ` of ${now.total}` : ""}${left(now)}`);
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
    other.tabIndex = other === button ? 0 : -1;
  }
}

function setLabel(value) {
  label = value;
  choose($("label"), $("label").children[value - 1]);
}

function setTool(name) {
  tool = name;
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
$("undo").addEventListener("click", undo);
$("window").addEventListener("change", () => { $("other").hidden = $("window").value !== ""; });
$("opacity").addEventListener("input", paint);
$("slice").addEventListener("input", () => attempt(() => go(Number($("slice").value))));
$("view").addEventListener("wheel", (event) => {
  event.preventDefault();
  attempt(() => go(slice + Math.sign(event.deltaY)));
}, { passive: false });
new ResizeObserver(draw).observe($("view"));

$("view").addEventListener("pointerdown", (event) => {
  if (!volume || job || event.button) return;
  const [x, y] = view.voxel(event);
  if (tool === "box") {
    $("view").setPointerCapture(event.pointerId);
    dragged = { label, box: [x, y, x, y] };
  } else {
    prompts.add(label, slice, { points: [[x, y, tool === "inside"]] });
    list();
  }
});
$("view").addEventListener("pointermove", (event) => {
  if (!dragged) return;
  dragged.box.splice(2, 2, ...view.voxel(event));
  draw();
});
$("view").addEventListener("pointerup", () => {
  if (!dragged) return;
  const [x0, y0, x1, y1] = dragged.box;
  dragged = null;
  if (x0 !== x1 && y0 !== y1) {
    prompts.add(label, slice, {
      box: [Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)],
    });
  }
  list();
});
$("view").addEventListener("pointercancel", () => { dragged = null; draw(); });

const KEYS = {
  b: () => setTool("box"),
  p: () => setTool("inside"),
  n: () => setTool("outside"),
  z: undo,
  t: track,
  s: () => (found ? save() : undefined),
  escape: () => (job ? server.cancel(job) : undefined),
  arrowup: () => go(slice + 1),
  arrowright: () => go(slice + 1),
  arrowdown: () => go(slice - 1),
  arrowleft: () => go(slice - 1),
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, select")) return;
  const key = event.key.toLowerCase();
  const action = key > "0" && key <= $("label").children.length && key.length === 1 ? () => setLabel(Number(key)) : KEYS[key];
  if (!action) return;
  event.preventDefault();
  attempt(action);
});

attempt(async () => {
  const { checkpoint, files, colours } = await server.start();
  setColours(colours);
  colours.forEach((colour, at) => offer(at + 1));
  setLabel(1);
  $("checkpoint").textContent = `checkpoint ${checkpoint}`;
  $("file").replaceChildren(...files.map((name) => new Option(name)));
  $("file").disabled = !files.length;
  say(files.length ? "open a volume" : "upload a volume, or start the server with a folder of volumes");
  list();
});
