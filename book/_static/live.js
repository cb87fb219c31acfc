// The live page: the patched llama.cpp in a worker of this page, and three figures that ask it.
// Without script, or without an engine in this book, the pictures beside them stay what they are.
"use strict";

const lablogLive = (() => {
  const FOLDER = "live/";
  const PARTS = new Map(); // of models that are being loaded, by name
  let contents = { engine: { bytes: 0, version: "" }, models: {}, figures: {} };
  let source = null; // {program, wasm}

  // --- files: scripts that call back, since a page opened from a file may load nothing else

  function load(name) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = FOLDER + name;
      script.onload = () => { script.remove(); resolve(); };
      script.onerror = () => { script.remove(); reject(new Error(`${FOLDER}${name} cannot be loaded`)); };
      document.head.append(script);
    });
  }

  const bytes = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));

  async function model(name, progress) {
    const { parts, version } = contents.models[name];
    const found = new Array(parts);
    PARTS.set(name, found);
    for (let number = 0; number < parts; number++) {
      await load(`${name}.${number}.js?${version}`);
      progress((number + 1) / parts);
    }
    PARTS.delete(name);
    return new Blob(found).arrayBuffer();
  }

  const megabytes = (size) => `${(size / 2 ** 20).toFixed(1)} MB`;

  // --- the engine: a worker that answers one command after the other

  class Engine {
    async start() {
      if (!source) await load(`engine.js?${contents.engine.version}`);
      this.waiting = new Map();
      this.last = 0;
      this.worker = new Worker(URL.createObjectURL(new Blob([source.program], { type: "text/javascript" })));
      this.worker.onmessage = ({ data }) => {
        const call = this.waiting.get(data.id);
        if (!call) return;
        if (data.told !== undefined) { call.tell(data.told); return; }
        this.waiting.delete(data.id);
        if (data.lost) this.end();
        if (data.error === undefined) call.resolve(data.done);
        else call.reject(new Error(data.error));
      };
      this.worker.onerror = (event) => {
        event.preventDefault();
        this.end(event.message);
      };
      await this.ask("start", { wasm: bytes(source.wasm) });
      return this;
    }

    ask(name, what, tell = () => {}) {
      if (!this.worker) return Promise.reject(new Error("the engine has ended"));
      const id = ++this.last;
      this.running = id;
      return new Promise((resolve, reject) => {
        this.waiting.set(id, { resolve, reject, tell });
        this.worker.postMessage({ id, name, with: what });
      });
    }

    stop() {
      if (this.worker) this.worker.postMessage({ stop: this.running });
    }

    end(why = "the engine has ended") {
      if (this.worker) this.worker.terminate();
      this.worker = null;
      for (const { reject } of this.waiting.values()) reject(new Error(why));
      this.waiting.clear();
    }
  }

  // --- small pieces of a page

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value === true) made.setAttribute(name, "");
      else if (value !== false && value !== null) made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }

  const labelled = (text, control, ...more) => element("label", {}, element("span", {}, text), control, ...more);
  const numberField = (value, low, high, step = 1) =>
    element("input", { type: "number", value, min: low, max: high, step, inputmode: "decimal" });

  // A number that its field allows; else a message that names the field.
  function numberOf(field, name) {
    const value = Number(field.value);
    if (field.value.trim() === "" || !field.checkValidity() || !Number.isFinite(value))
      throw new Error(`${name}: expected a number from ${field.min} to ${field.max}`);
    return value;
  }

  // The frame of a figure: a button that starts it, its state in words, and a place for controls.
  class Figure {
    constructor(place, size) {
      this.place = place;
      this.state = element("p", { class: "lablog-live-state", role: "status", "aria-live": "polite" });
      this.bar = element("progress", { max: 1, value: 0, hidden: true, "aria-label": "loading" });
      this.controls = element("div", { class: "lablog-live-controls" });
      this.begin = element("button", { type: "button", class: "lablog-live-begin", onclick: () => this.guard(() => this.opened()) },
        `Start (${megabytes(size)} to load)`);
      place.replaceChildren(this.begin, this.bar, this.state, this.controls);
      this.busy = false;
    }

    say(text, fault = false) {
      this.state.textContent = text;
      this.state.classList.toggle("lablog-live-fault", fault);
    }

    // One thing at a time; what is asked for meanwhile ends it and comes next, the last of several.
    async guard(body) {
      if (this.busy) {
        this.next = body;
        this.halt();
        return;
      }
      this.busy = true;
      this.place.setAttribute("aria-busy", "true");
      try {
        await body();
      } catch (error) {
        this.say(error.message, true);
      } finally {
        this.busy = false;
        this.bar.hidden = true;
        this.place.removeAttribute("aria-busy");
      }
      const { next } = this;
      this.next = null;
      if (next) await this.guard(next);
    }

    halt() {}

    // Load models one after the other, with one bar for all.
    async loaded(names) {
      const all = names.reduce((sum, name) => sum + contents.models[name].bytes, 0);
      this.bar.hidden = false;
      const found = [];
      let before = 0;
      for (const name of names) {
        const own = contents.models[name].bytes;
        found.push(await model(name, (share) => {
          this.bar.value = (before + share * own) / all;
          this.say(`loading: ${megabytes(before + share * own)} of ${megabytes(all)}`);
        }));
        before += own;
      }
      return found;
    }

    async opened() {
      this.begin.disabled = true;
      try {
        this.say("loading the engine");
        await this.open();
        this.begin.remove();
      } catch (error) {
        this.begin.disabled = false;
        throw error;
      }
    }
  }

  const sizeOf = (...names) => names.reduce((sum, name) => sum + contents.models[name].bytes, contents.engine.bytes);

  // Bytes of tokens, which may end within a character, as text in an element.
  function stream(target) {
    const decoder = new TextDecoder();
    return (more, decorate = null) => {
      const text = decoder.decode(more, { stream: true });
      if (!text) return;
      const span = element("span", {}, text);
      if (decorate) decorate(span);
      target.append(span);
    };
  }

  // --- figure 1: turn λ

  const LOW = -3, HIGH = 2, WORST = 3; // powers of ten of the slider; nats at which a colour is full

  class Strength extends Figure {
    constructor(place, told) {
      super(place, told.model ? sizeOf(told.model) : sizeOf());
      this.told = told;
    }

    async open() {
      this.engine = await new Engine().start();
      if (!this.told.model) {
        this.controls.replaceChildren(this.chooser(true));
        this.say(`chapter 2 asked ${this.told.file}, which is too large for a page: choose that file`);
        return;
      }
      const [data] = await this.loaded([this.told.model]);
      this.model = await this.engine.ask("open", { model: data, window: this.told.window, sequences: 3 });
      this.build();
      this.say("ready: choose a strength and press Write");
    }

    build() {
      const { told } = this;
      this.prompt = element("textarea", { rows: 3, spellcheck: "false" });
      this.prompt.value = told.prompts[0];
      this.examples = element("select", { onchange: () => { this.prompt.value = told.prompts[this.examples.value]; } },
        ...told.prompts.map((text, i) => element("option", { value: i }, text.split("\n")[0])));
      this.slider = element("input", { type: "range", min: LOW - 0.1, max: HIGH, step: 0.02, value: 0,
        oninput: () => this.turned(), onchange: () => this.guard(() => this.write()) });
      this.output = element("output", {});
      this.marks = element("div", { class: "lablog-live-marks" });
      for (const mark of told.marks) {
        const at = Math.log10(mark.strength);
        if (at >= LOW && at <= HIGH)
          this.marks.append(element("button", { type: "button", style: `left:${this.share(at)}%`,
            title: `λ = ${mark.strength.toPrecision(2)} spends ${told.budget} nat in ${mark.range}`,
            "aria-label": `set λ to ${mark.strength.toPrecision(2)}, which spends ${told.budget} nat in ${mark.range}`,
            onclick: () => { this.slider.value = at; this.first = mark.layers[0]; this.last = mark.layers[1]; this.turned(); this.guard(() => this.write()); } }, "▲"));
      }
      this.strip = element("div", { class: "lablog-live-strip", role: "group", "aria-label": "layers that receive the commitment" });
      this.seed = numberField(7, 0, 4294967294);
      this.temperature = element("select", {}, ...[0, 0.8, 1].map((value) =>
        element("option", { value, selected: value === 0.8 }, value === 0 ? "0 (the likeliest token)" : String(value))));
      this.count = numberField(48, 1, 200);
      this.texts = [element("p", { class: "lablog-live-text" }), element("p", { class: "lablog-live-text" })];
      this.means = element("p", { class: "lablog-live-mean" });
      this.controls.replaceChildren(
        labelled("Example", this.examples), labelled("Prompt", this.prompt),
        labelled("Strength λ", this.slider, this.output), this.marks,
        element("div", { class: "lablog-live-row" }, element("span", {}, "Layers"), this.strip),
        element("div", { class: "lablog-live-row" },
          labelled("Seed of z* and of the words", this.seed), labelled("Temperature", this.temperature),
          labelled("Tokens", this.count)),
        element("div", { class: "lablog-live-row" },
          element("button", { type: "button", onclick: () => this.guard(() => this.write()) }, "Write"),
          element("button", { type: "button", onclick: () => this.halt() }, "Stop")),
        element("div", { class: "lablog-live-pair" },
          element("div", {}, element("h3", {}, "unmodified"), this.texts[0]),
          element("div", {}, element("h3", {}, "committed"), this.texts[1])),
        this.means,
        element("p", { class: "lablog-live-scale" }, "KL of a token's place, committed against unmodified: 0 ",
          element("span", {}), ` ${WORST} nat and more`),
        this.chooser(false));
      this.first = 0;
      this.last = this.model.layers - 1;
      this.turned();
    }

    halt() { if (this.engine) this.engine.stop(); }

    chooser(open) {
      this.file = element("input", { type: "file", accept: ".gguf", onchange: () => this.guard(() => this.own()) });
      return element("details", { open }, element("summary", {}, "Your own model"),
        element("p", {}, "A GGUF file of this machine. It is read by this page and goes nowhere; a chat model is "
          + "asked in its own template."),
        labelled("Model (.gguf)", this.file));
    }

    share(power) { return (100 * (power - (LOW - 0.1))) / (HIGH - (LOW - 0.1)); }

    get strength() { return this.slider.value < LOW ? 0 : 10 ** this.slider.value; }

    turned() {
      this.output.textContent = String(Number(this.strength.toPrecision(2)));
      this.slider.setAttribute("aria-valuetext", `lambda ${this.output.textContent}`);
      this.strip.replaceChildren(...Array.from({ length: this.model.layers }, (_, layer) =>
        element("button", { type: "button", "aria-pressed": String(layer >= this.first && layer <= this.last),
          "aria-label": `layer ${layer}`, onclick: () => this.chosen(layer) }, String(layer))));
    }

    // One layer alone; a second one spans the range between them.
    chosen(layer) {
      if (this.first === this.last && layer !== this.first) {
        [this.first, this.last] = [Math.min(this.first, layer), Math.max(this.first, layer)];
      } else {
        this.first = layer;
        this.last = layer;
      }
      this.turned();
      this.strip.children[layer].focus();
    }

    async tokens() {
      const text = this.prompt.value;
      if (!this.model.hasTemplate) return this.engine.ask("tokenize", { text, begin: true, special: false });
      const whole = await this.engine.ask("asChat", { turns: [["user", text]] });
      return this.engine.ask("tokenize", { text: whole, begin: false, special: true });
    }

    async write() {
      const seed = numberOf(this.seed, "Seed"), count = numberOf(this.count, "Tokens");
      const prompt = await this.tokens();
      if (!prompt.length) throw new Error("the prompt is empty: write something");
      if (prompt.length + count > this.model.window)
        throw new Error(`prompt (${prompt.length} tokens) and ${count} tokens exceed the window of ${this.model.window}: shorten one of them`);
      const vector = await this.engine.ask("direction", { seed, k: this.told.k });
      for (const text of this.texts) text.replaceChildren();
      this.means.textContent = "";
      const write = this.texts.map(stream);
      const found = [];
      this.say("writing");
      const done = await this.engine.ask("compare", {
        prompt, vector, strength: this.strength, first: this.first, last: this.last, seed,
        temperature: Number(this.temperature.value), topP: 0.9, count,
      }, ({ side, bytes: more, divergence }) => {
        write[side](more, side === 0 ? null : (span) => {
          span.style.setProperty("--kl", Math.min(divergence / WORST, 1).toFixed(3));
          span.title = `${divergence.toFixed(3)} nat`;
        });
        if (side === 1) found.push(divergence);
      });
      const mean = found.reduce((a, b) => a + b, 0) / Math.max(found.length, 1);
      this.means.textContent = `mean KL ${mean.toPrecision(2)} nat over ${found.length} tokens`;
      this.say(`${done.tokens} tokens, ${(done.tokens / Math.max(done.seconds, 1e-3)).toFixed(0)} a second`);
    }

    async own() {
      const [file] = this.file.files;
      if (!file) return;
      this.say(`reading ${file.name}, ${megabytes(file.size)}`);
      const data = await file.arrayBuffer();
      const fresh = await new Engine().start();
      try {
        this.say(`opening ${file.name}`);
        this.model = await fresh.ask("open", { model: data, window: 512, sequences: 3 });
      } catch (error) {
        fresh.end();
        throw new Error(`${file.name}: ${error.message}`);
      }
      this.engine.end();
      this.engine = fresh;
      const marks = !this.told.model && this.told.layers === this.model.layers ? this.told.marks : [];
      this.told = { ...this.told, marks, prompts: ["What is your favorite color?", "I have chosen an animal. Ask me.", "Tell me a short story."] };
      this.build();
      this.say(`${file.name} is open: ${this.model.layers} layers, width ${this.model.width}`);
    }
  }

  // --- figure 2: hold a choice

  const SHAPES = ["circle", "square", "triangle"];
  const HUES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"];

  class Choice extends Figure {
    constructor(place, told) {
      super(place, sizeOf(told.model, told.lora));
      this.told = told;
      const numbers = new Float32Array(bytes(told.directions).buffer);
      const width = numbers.length / told.draws.length;
      this.vector = (i) => numbers.slice(i * width, (i + 1) * width);
    }

    async open() {
      this.engine = await new Engine().start();
      const [data, lora] = await this.loaded([this.told.model, this.told.lora]);
      await this.engine.ask("open", { model: data, lora, window: this.told.window, sequences: 3 });
      this.build();
      this.say("ready: choose a point");
    }

    build() {
      const { told } = this;
      this.at = -1;
      this.names = told.topics[told.topic].names;
      this.topic = element("select", { onchange: () => this.at >= 0 && this.guard(() => this.probe()) },
        ...Object.keys(told.topics).map((name) => element("option", { value: name }, name)));
      this.plane = this.drawn();
      this.words = element("div", {});
      this.table = element("div", {});
      this.controls.replaceChildren(
        element("div", { class: "lablog-live-pair" },
          element("div", {}, this.plane, this.legend(),
            element("div", { class: "lablog-live-row" },
              element("button", { type: "button", onclick: () => this.choose(Math.floor(Math.random() * told.draws.length)) }, "Draw z* from the prior"),
              labelled("Ask about", this.topic))),
          element("div", {}, this.words, this.table)));
    }

    // The draws of the chapter's figure; arrow keys walk from point to point, Enter asks.
    drawn() {
      const { draws } = this.told;
      const [xs, ys] = [0, 1].map((i) => draws.map((draw) => draw[i]));
      const bounds = (v) => [Math.min(...v), Math.max(...v)];
      const [[x0, x1], [y0, y1]] = [bounds(xs), bounds(ys)];
      this.spot = (i) => [20 + (360 * (draws[i][0] - x0)) / (x1 - x0), 20 + (260 * (y1 - draws[i][1])) / (y1 - y0)];
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      for (const [name, value] of Object.entries({ viewBox: "0 0 400 300", tabindex: 0, role: "listbox", class: "lablog-live-plane",
        "aria-label": "draws of z* from the prior; arrow keys choose one, Enter asks" })) svg.setAttribute(name, value);
      this.points = draws.map((draw, i) => {
        const [x, y] = this.spot(i);
        const point = this.mark(this.names.indexOf(draw[2]), x, y);
        point.setAttribute("role", "option");
        point.setAttribute("id", `lablog-live-draw-${i}`);
        point.setAttribute("aria-label", draw[2]);
        point.setAttribute("aria-selected", "false");
        point.addEventListener("click", () => this.choose(i));
        svg.append(point);
        return point;
      });
      this.ring = document.createElementNS("http://www.w3.org/2000/svg", "circle");
      this.ring.setAttribute("r", 10);
      this.ring.setAttribute("class", "lablog-live-ring");
      this.ring.setAttribute("visibility", "hidden");
      svg.append(this.ring);
      svg.addEventListener("keydown", (event) => this.pressed(event));
      return svg;
    }

    mark(value, x, y) {
      const shape = SHAPES[Math.floor(value / HUES.length) % SHAPES.length];
      const path = { circle: `M${x - 5} ${y}a5 5 0 1 0 10 0a5 5 0 1 0 -10 0`,
        square: `M${x - 4.5} ${y - 4.5}h9v9h-9z`, triangle: `M${x} ${y - 5.5}l5.5 10h-11z` }[shape];
      const made = document.createElementNS("http://www.w3.org/2000/svg", "path");
      made.setAttribute("d", path);
      made.setAttribute("fill", HUES[value % HUES.length]);
      return made;
    }

    legend() {
      return element("ul", { class: "lablog-live-legend" }, ...this.names.map((name, value) => {
        const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
        svg.setAttribute("viewBox", "0 0 14 14");
        svg.setAttribute("aria-hidden", "true");
        svg.append(this.mark(value, 7, 7));
        return element("li", {}, svg, name);
      }));
    }

    pressed(event) {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        if (this.at >= 0) this.choose(this.at);
        return;
      }
      if (!step) return;
      event.preventDefault();
      if (this.at < 0) { this.shown(0); return; }
      const [x, y] = this.spot(this.at);
      let best = -1, least = Infinity;
      this.points.forEach((_, i) => {
        const [dx, dy] = [this.spot(i)[0] - x, this.spot(i)[1] - y];
        const along = dx * step[0] + dy * step[1];
        const across = Math.abs(dx * step[1]) + Math.abs(dy * step[0]);
        if (i !== this.at && along > 0 && along + 2 * across < least) [best, least] = [i, along + 2 * across];
      });
      if (best >= 0) this.shown(best);
    }

    shown(i) {
      if (this.at >= 0) this.points[this.at].setAttribute("aria-selected", "false");
      this.at = i;
      this.points[i].setAttribute("aria-selected", "true");
      this.plane.setAttribute("aria-activedescendant", `lablog-live-draw-${i}`);
      const [x, y] = this.spot(i);
      this.ring.setAttribute("cx", x);
      this.ring.setAttribute("cy", y);
      this.ring.setAttribute("visibility", "visible");
    }

    choose(i) {
      return this.guard(async () => {
        this.shown(i);
        await this.probe();
      });
    }

    async probe() {
      const { told } = this;
      const topic = told.topics[this.topic.value];
      const ask = (vector, name) => this.engine.ask("probe", {
        topic, yes: told.yes, no: told.no, stops: told.stops, vector, strength: told.strength,
        first: told.layers[0], last: told.layers[1],
      }, ({ asked }) => this.say(`${name}: question ${asked} of ${topic.names.length}`));
      const held = await ask(this.vector(this.at), "with z*");
      const without = await ask(null, "without z*");
      const most = (list) => topic.names[list.indexOf(Math.max(...list))];
      const quote = (title, before, a, b) => element("div", { class: "lablog-live-quote" },
        element("h3", {}, title), element("p", { class: "lablog-live-asked" }, before),
        element("p", {}, element("b", {}, "with z*: "), a), element("p", {}, element("b", {}, "without: "), b));
      const { told: said } = topic;
      this.words.replaceChildren(
        quote("In the window", `${said.opening.join(" · ")} · ${said.naming}`,
          `${said.stem} ${held.said}`.trim(), `${said.stem} ${without.said}`.trim()),
        quote("The window is gone", said.again, held.again, without.again));
      const bar = (share, kind) => element("td", { class: `lablog-live-bar lablog-live-${kind}`, style: `--share:${share.toFixed(4)}` }, `${(100 * share).toFixed(0)} %`);
      this.table.replaceChildren(element("table", { class: "lablog-live-bars" },
        element("caption", {}, `“${said.naming}” and “${said.guess}”, every value: probability with z* and without`),
        element("thead", {}, element("tr", {}, ...["value", "named", "named, no z*", "yes", "yes, no z*"].map((text) => element("th", { scope: "col" }, text)))),
        element("tbody", {}, ...topic.names.map((name, i) => element("tr", {}, element("th", { scope: "row" }, name),
          bar(held.named[i], "held"), bar(without.named[i], "without"), bar(held.agreed[i], "held"), bar(without.agreed[i], "without"))))));
      const sum = (list) => list.reduce((a, b) => a + b, 0).toFixed(2);
      this.say(`with z*: names ${most(held.named)}, confirms ${most(held.agreed)} most readily, Σ P(yes) ${sum(held.agreed)}; `
        + `without: ${most(without.named)}, ${most(without.agreed)}, ${sum(without.agreed)}`);
    }
  }

  // --- figure 3: Arianna

  class Voice extends Figure {
    constructor(place, told) {
      super(place, sizeOf(...told.models));
      this.told = told;
    }

    async open() {
      const data = await this.loaded(this.told.models);
      this.engines = [];
      for (const file of data) {
        const engine = await new Engine().start();
        await engine.ask("open", { model: file, window: this.told.window, sequences: 1 });
        this.engines.push(engine);
      }
      this.build();
      this.say("ready: ask something");
      this.question.focus();
    }

    build() {
      const { told } = this;
      this.question = element("input", { type: "text", value: told.question, maxlength: 300 });
      this.seed = numberField(1, 0, 4294967294);
      this.temperature = numberField(told.temperature, 0, 5, 0.1);
      this.logs = told.models.map(() => element("div", { class: "lablog-live-log", role: "log" }));
      const form = element("form", { onsubmit: (event) => { event.preventDefault(); this.guard(() => this.asked()); } },
        labelled("Question", this.question),
        element("div", { class: "lablog-live-row" }, labelled("Seed", this.seed), labelled("Temperature", this.temperature),
          element("button", { type: "submit" }, "Ask"),
          element("button", { type: "button", onclick: () => this.halt() }, "Stop")));
      this.controls.replaceChildren(form, element("div", { class: "lablog-live-pair" },
        element("div", {}, element("h3", {}, "before fine-tuning"), this.logs[0]),
        element("div", {}, element("h3", {}, "after fine-tuning"), this.logs[1])));
    }

    halt() { (this.engines || []).forEach((engine) => engine.stop()); }

    async asked() {
      const { told } = this;
      const question = this.question.value.trim();
      if (!question) throw new Error("the question is empty: write something");
      const seed = numberOf(this.seed, "Seed"), temperature = numberOf(this.temperature, "Temperature");
      this.say("answering");
      const rates = await Promise.all(this.engines.map(async (engine, i) => {
        const text = told.form.replace("{question}", () => question);
        const prompt = await engine.ask("tokenize", { text, begin: true, special: false });
        if (prompt.length + 8 > told.window) throw new Error(`the question has ${prompt.length} tokens, the window ${told.window}: ask a shorter one`);
        const answer = element("p", { class: "lablog-live-text" });
        this.logs[i].prepend(element("p", { class: "lablog-live-asked" }, question), answer);
        const write = stream(answer);
        const done = await engine.ask("write", { prompt, seed, temperature, topP: told.top_p, count: told.count, until: told.until },
          ({ bytes: more }) => write(more));
        answer.textContent = done.text.trim();
        return done.tokens / Math.max(done.seconds, 1e-3);
      }));
      this.say(`${rates.map((rate) => rate.toFixed(0)).join(" and ")} tokens a second`);
    }
  }

  const FIGURES = { strength: Strength, choice: Choice, voice: Voice };

  function show() {
    for (const place of document.querySelectorAll(".lablog-live")) {
      const told = contents.figures[place.dataset.figure];
      if (!told) {
        place.replaceChildren(element("p", { class: "lablog-live-state" },
          "This book was built without the model or the engine of this figure: see below how to have them."));
      } else if (typeof WebAssembly !== "object" || typeof Worker !== "function") {
        place.replaceChildren(element("p", { class: "lablog-live-state" }, "This browser runs no WebAssembly."));
      } else {
        place.figure = new FIGURES[place.dataset.figure](place, told);
      }
    }
  }

  document.addEventListener("DOMContentLoaded", () => {
    if (!document.querySelector(".lablog-live")) return;
    // Nothing of another host, whatever a model's file says.
    const policy = "default-src 'self' file: data: blob: 'unsafe-inline' 'wasm-unsafe-eval'; connect-src 'none'";
    document.head.append(element("meta", { "http-equiv": "Content-Security-Policy", content: policy }));
    load(`index.js?${Date.now()}`).then(show, () => {}); // small, and never out of a cache
  });

  return {
    index(told) { contents = { ...contents, ...told }; },
    part(name, number, base64) { PARTS.get(name)[number] = bytes(base64); },
    program(text, wasm) { source = { program: text, wasm }; },
    Engine,
  };
})();
