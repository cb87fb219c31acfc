// The engine of the live page in a worker: commands come as messages {id, name, with}, answers go
// as {id, told} while it works and {id, done} or {id, error} at the end. One command at a time; a
// message {stop: id} ends the one that runs behind its current token.
//
// `lablogEngine` (live.js of Emscripten) makes the module out of the WebAssembly given to "start".
// Sequence numbers are those of engine.cpp.

/* global lablogEngine, self */
"use strict";

let engine = null; // the module
let stopped = null; // id of the command that shall end
const ENCODER = new TextEncoder();

// --- the functions of engine.cpp with JavaScript's values

function checked(result) {
  if (result < 0)
    throw new Error(engine.UTF8ToString(engine._live_error()));
  return result;
}

function withMemory(arrays, body) {
  // Arrays (Int32Array, Float32Array, Uint8Array, or null) as pointers, freed behind `body`.
  const pointers = arrays.map((array) => (array === null ? 0 : engine._malloc(Math.max(array.byteLength, 1))));
  try {
    arrays.forEach((array, i) => {
      if (array) engine.HEAPU8.set(new Uint8Array(array.buffer, array.byteOffset, array.byteLength), pointers[i]);
    });
    return body(...pointers);
  } finally {
    pointers.forEach((pointer) => pointer && engine._free(pointer));
  }
}

const zeroEnded = (text) => ENCODER.encode(`${text}\0`);

function open({ model, lora = null, window, sequences }) {
  engine.FS.writeFile("/model.gguf", new Uint8Array(model));
  if (lora) engine.FS.writeFile("/lora.gguf", new Uint8Array(lora));
  try {
    withMemory([zeroEnded("/model.gguf"), zeroEnded(lora ? "/lora.gguf" : "")],
      (a, b) => checked(engine._live_open(a, b, window, sequences)));
  } finally {
    for (const path of ["/model.gguf", "/lora.gguf"])
      if (engine.FS.analyzePath(path).exists) engine.FS.unlink(path);
  }
  return {
    layers: engine._live_layers(), width: engine._live_width(), window: engine._live_window(),
    vocabulary: engine._live_vocabulary(), hasTemplate: engine._live_has_template() === 1,
    memory: engine.HEAPU8.length,
  };
}

function tokenize(text, begin = true, special = false) {
  const bytes = zeroEnded(text);
  const room = new Int32Array(bytes.length + 8);
  return withMemory([bytes, room], (a, b) => {
    const n = checked(engine._live_tokenize(a, begin, special, b, room.length));
    return [...engine.HEAP32.subarray(b / 4, b / 4 + n)];
  });
}

function asChat(turns) {
  // The model's own template over [role, text] pairs.
  const bytes = ENCODER.encode(turns.flat().map((text) => `${text}\0`).join(""));
  let room = new Uint8Array(2 * bytes.length + 1024);
  for (;;) {
    const [n, text] = withMemory([bytes, room], (a, b) => {
      const size = checked(engine._live_chat(a, turns.length, b, room.length));
      return [size, new TextDecoder().decode(engine.HEAPU8.slice(b, b + Math.min(size, room.length)))];
    });
    if (n <= room.length) return text;
    room = new Uint8Array(n);
  }
}

function piece(token) {
  return withMemory([new Uint8Array(512)], (a) => {
    const n = checked(engine._live_piece(token, a, 512));
    return engine.HEAPU8.slice(a, a + n);
  });
}

function read(numbers, tokens) {
  withMemory([Int32Array.from(numbers), Int32Array.from(tokens)],
    (a, b) => checked(engine._live_read(a, b, tokens.length)));
}

const readBy = (sequence, tokens) => read(tokens.map(() => sequence), tokens);

function direction(seed, k) {
  const width = engine._live_width();
  return withMemory([new Float32Array(width)], (a) => {
    checked(engine._live_direction(seed, k, a));
    return engine.HEAPF32.slice(a / 4, a / 4 + width);
  });
}

function commit(sequence, vector, strength, first, last) {
  if (!vector) return checked(engine._live_release(sequence));
  return withMemory([vector], (a) => checked(engine._live_commit(sequence, a, strength, first, last)));
}

function logits(sequence) {
  const n = engine._live_vocabulary();
  return withMemory([new Float32Array(n)], (a) => {
    checked(engine._live_logits(sequence, a));
    return engine.HEAPF32.slice(a / 4, a / 4 + n);
  });
}

function number(result) {
  if (Number.isNaN(result)) throw new Error(engine.UTF8ToString(engine._live_error()));
  return result;
}

const logProbability = (sequence, token) => number(engine._live_log_probability(sequence, token));
const divergence = (p, q) => number(engine._live_divergence(p, q));

// log P of `tokens` behind `sequence`, which stays as it is; `scratch` is another.
function logOf(sequence, tokens, scratch) {
  let sum = logProbability(sequence, tokens[0]);
  if (tokens.length > 1) checked(engine._live_fork(sequence, scratch));
  for (let i = 1; i < tokens.length; i++) {
    readBy(scratch, [tokens[i - 1]]);
    sum += logProbability(scratch, tokens[i]);
  }
  return sum;
}

// Lets messages in, so that a command can be stopped; setTimeout would wait milliseconds.
const breath = new MessageChannel();
const pause = () => new Promise((resolve) => {
  breath.port1.onmessage = resolve;
  breath.port2.postMessage(null);
});

// --- commands

const commands = {
  async start({ wasm }) {
    engine = await lablogEngine({ wasmBinary: wasm, print: () => {}, printErr: () => {} });
    return {};
  },

  open,
  tokenize: ({ text, begin, special }) => tokenize(text, begin, special),
  asChat: ({ turns }) => asChat(turns),
  direction: ({ seed, k }) => direction(seed, k),

  // Logits behind `tokens` under a commitment, for tests.
  logits({ tokens, vector = null, strength = 0, first = 0, last = 0 }) {
    checked(engine._live_forget(0));
    commit(0, vector, strength, first, last);
    readBy(0, tokens);
    return logits(0);
  },

  // Continue `prompt` (tokens) with and without the commitment: sequences 0 and 1. Tells
  // {side, bytes, divergence}; the divergence, KL(committed || unmodified) of the place in which a
  // committed token was drawn, comes from sequence 2, which reads the committed text unmodified.
  async compare({ prompt, vector, strength, first, last, seed, temperature, topP, count }, tell, id) {
    for (const sequence of [0, 1, 2]) {
      checked(engine._live_forget(sequence));
      checked(engine._live_release(sequence));
      checked(engine._live_sampler(sequence, temperature, topP, seed));
    }
    commit(1, vector, strength, first, last);
    for (const sequence of [0, 1, 2]) readBy(sequence, prompt);
    const ended = [false, false];
    let written = 0;
    const began = performance.now();
    for (let step = 0; step < count && !(ended[0] && ended[1]); step++) {
      const numbers = [], tokens = [];
      for (const side of [0, 1]) {
        if (ended[side]) continue;
        const token = checked(engine._live_next(side));
        if (engine._live_ends(token) === 1) { ended[side] = true; continue; }
        tell({ side, bytes: piece(token), divergence: side ? divergence(1, 2) : 0 });
        written += 1;
        numbers.push(side);
        tokens.push(token);
        if (side) { numbers.push(2); tokens.push(token); }
      }
      read(numbers, tokens);
      await pause();
      if (stopped === id) break;
    }
    return { tokens: written, seconds: (performance.now() - began) / 1000, memory: engine.HEAPU8.length };
  },

  // The questions of one topic under `vector` (null: none): P(value | what is it?) among the values,
  // P(yes | is it X?) among yes and no, and what is said to the naming question and to one that
  // a window asks which has lost everything before.
  async probe({ topic, yes, no, stops, vector, strength, first, last }, tell, id) {
    for (const sequence of [0, 1, 2]) {
      checked(engine._live_forget(sequence));
      commit(sequence, vector, strength, first, last);
      checked(engine._live_sampler(sequence, 0, 1, 0));
    }
    readBy(0, topic.opening);
    const asked = (tokens) => {
      checked(engine._live_fork(0, 1));
      readBy(1, tokens);
    };
    asked(topic.naming);
    const logs = topic.values.map((tokens) => logOf(1, tokens, 2));
    const most = Math.max(...logs);
    const weights = logs.map((log) => Math.exp(log - most));
    const total = weights.reduce((a, b) => a + b, 0);
    const named = weights.map((weight) => weight / total);
    const said = answer(1, stops);
    const agreed = [];
    for (const guess of topic.guesses) {
      asked(guess);
      const mass = (words) => words.reduce((sum, tokens) => sum + Math.exp(logOf(1, tokens, 2)), 0);
      const [y, n] = [mass(yes), mass(no)];
      agreed.push(y / (y + n));
      tell({ asked: agreed.length });
      await pause();
      if (stopped === id) break;
    }
    checked(engine._live_forget(1));
    readBy(1, topic.evicted);
    return { named, agreed, said, again: answer(1, stops) };
  },

  // Continue `prompt` (tokens); tells {bytes}.
  async write({ prompt, seed, temperature, topP, count, until = "" }, tell, id) {
    checked(engine._live_forget(0));
    checked(engine._live_sampler(0, temperature, topP, seed));
    readBy(0, prompt);
    const decoder = new TextDecoder();
    let text = "", tokens = 0;
    const began = performance.now();
    for (let step = 0; step < count; step++) {
      const token = checked(engine._live_next(0));
      if (engine._live_ends(token) === 1) break;
      const bytes = piece(token);
      tokens += 1;
      text += decoder.decode(bytes, { stream: true });
      if (until && text.includes(until)) { text = text.slice(0, text.indexOf(until)); break; }
      tell({ bytes });
      if (prompt.length + tokens >= engine._live_window()) break;
      readBy(0, [token]);
      await pause();
      if (stopped === id) break;
    }
    return { text, tokens, seconds: (performance.now() - began) / 1000 };
  },
};

// What is said greedily behind `sequence`, up to a token that ends an answer.
function answer(sequence, stops) {
  const bytes = [];
  for (let step = 0; step < 24; step++) {
    const token = checked(engine._live_next(sequence));
    if (stops.includes(token) || engine._live_ends(token) === 1) break;
    bytes.push(...piece(token));
    readBy(sequence, [token]);
  }
  return new TextDecoder().decode(Uint8Array.from(bytes)).trim();
}

let queue = Promise.resolve();

self.onmessage = ({ data }) => {
  if (data.stop !== undefined) { stopped = data.stop; return; }
  queue = queue.then(async () => {
    try {
      const done = await commands[data.name](data.with, (told) => self.postMessage({ id: data.id, told }), data.id);
      self.postMessage({ id: data.id, done });
    } catch (error) {
      // What llama.cpp ended in an abort leaves a module that cannot be used any more.
      self.postMessage({ id: data.id, error: error.message || String(error), lost: error instanceof WebAssembly.RuntimeError });
    }
  });
};
