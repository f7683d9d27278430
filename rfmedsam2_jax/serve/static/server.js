// What the server is asked. The token lies behind # in the address.

const token = location.hash.slice(1);

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(`api/v1/${path}`, {
      ...options, headers: { Authorization: `Bearer ${token}`, ...options.headers },
    });
  } catch {
    throw new Error("the command has ended; start it again");
  }
  if (!answer.ok) {
    const text = await answer.text();
    let message = text;
    try { message = JSON.parse(text).error; } catch { /* a line of text */ }
    throw new Error(message);
  }
  return answer;
}

const json = async (path, options) => (await ask(path, options)).json();
const post = (path, value) => json(path, {
  method: "POST", body: JSON.stringify(value), headers: { "Content-Type": "application/json" },
});
const bytes = async (path) => new Uint8Array(await (await ask(path)).arrayBuffer());

export const start = () => json("server");
// Settings: plane, window, and series where one of a study is meant.
export const open = (file, settings) => post("volumes", { file, ...settings });
export const upload = (file, settings) => json(
  `uploads?${new URLSearchParams({ name: file.name, ...settings })}`,
  { method: "POST", body: file },
);
export const image = (volume, slice, plane) => bytes(
  `volumes/${volume}/image/${slice}?plane=${plane}`,
);
export const labels = (volume, slice, plane) => bytes(
  `volumes/${volume}/labels/${slice}?plane=${plane}`,
);
export const values = async (volume, slice, plane) => new Float32Array(
  (await bytes(`volumes/${volume}/values/${slice}?plane=${plane}`)).buffer,
);
export const about = (volume) => json(`volumes/${volume}`);
export const begin = (volume, file) => json(
  `volumes/${volume}/labels?${new URLSearchParams({ name: file.name })}`,
  { method: "PUT", body: file },
);
export const segment = (volume, model) => post(`volumes/${volume}/segment`, { model });
export const track = (volume, prompts) => post(
  `volumes/${volume}/track`, { prompts, space: "zyx" },
);
export const job = (name) => json(`jobs/${name}`);
export const cancel = (name) => json(`jobs/${name}`, { method: "DELETE" });
export const save = async (volume, kind) => (await ask(`volumes/${volume}/export/${kind}`)).blob();
