// The engine under Node, for tests and bench: node.js ENGINE.JS, commands as JSON on standard input
// ([[name, with], ...]; {"file": PATH} and {"floats": BASE64} stand for bytes), answers as JSON.
"use strict";
const fs = require("fs");

globalThis.self = globalThis;
Object.assign(globalThis, { require, __dirname }); // what Emscripten asks Node for
const filled = (value) => {
  if (Array.isArray(value)) return value.map(filled);
  if (value === null || typeof value !== "object") return value;
  if (value.file) return new Uint8Array(fs.readFileSync(value.file)).buffer;
  if (value.floats) return new Float32Array(new Uint8Array(Buffer.from(value.floats, "base64")).buffer);
  return Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, filled(inner)]));
};
const plain = (_, value) => (ArrayBuffer.isView(value) ? Array.from(value) : value);

const answers = [];
let next = () => {};
self.postMessage = (message) => {
  if (message.told !== undefined) { answers[message.id].told.push(message.told); return; }
  answers[message.id] = { ...answers[message.id], ...message };
  next();
};
let wasm = null;
globalThis.lablogLive = {
  program(text, base64) { (0, eval)(text); wasm = Buffer.from(base64, "base64"); },
};
(0, eval)(fs.readFileSync(process.argv[2], "utf8"));

(async () => {
  const commands = [["start", { wasm }], ...filled(JSON.parse(fs.readFileSync(0, "utf8")))];
  for (const [id, [name, what]] of commands.entries()) {
    answers[id] = { told: [] };
    await new Promise((resolve) => { next = resolve; self.onmessage({ data: { id, name, with: what } }); });
  }
  if (answers[0].error) throw new Error(answers[0].error);
  process.stdout.write(JSON.stringify(answers.slice(1), plain), () => process.exit(0));
})();
