// Runs the scripts of an exported page in node, with stand-ins for what a browser has, and a list of
// calls from a file: node exported_page.js PAGE CALLS -> their results, as JSON.
// Loaded by test_chat_export.py.
"use strict";

const fs = require("fs");
const vm = require("vm");
const [page, calls] = process.argv.slice(2).map((name) => fs.readFileSync(name, "utf8"));
const texts = {};
const scripts = /<script([^>]*)>([^]*?)<\/script>/g;
for (const [, head, text] of page.matchAll(scripts)) {
  texts[head.match(/id="(\w+)"/)?.[1] ?? "script" + Object.keys(texts).length] = text;
}

// The worker is this process: each side's messages are copied, as in a browser.
const later = (handler, data) => setTimeout(() => handler()({data: structuredClone(data)}));
globalThis.onmessage = null;
globalThis.Blob = class { constructor(parts) { this.text = parts.join("\n"); } };
globalThis.URL.createObjectURL = (blob) => blob.text;
globalThis.Worker = class {
  constructor(source) {
    globalThis.postMessage = (data) => later(() => this.onmessage, data);
    vm.runInThisContext(source);
  }

  postMessage(data) { later(() => globalThis.onmessage, data); }
};

// An image's address is its pixels, as JSON.
let shown = null;
globalThis.Image = class {
  async decode() {
    shown = JSON.parse(this.src);
    Object.assign(this, {width: shown.width, height: shown.height});
  }
};
const context = {fillRect() {}, drawImage() {}, getImageData: () => shown};
globalThis.document = {
  getElementById: (id) => ({textContent: texts[id]}),
  createElement: () => ({getContext: () => context}),
};
vm.runInThisContext(Object.values(texts).find((text) => text.includes("const engine = ")));

// Also what the engine does not offer. `inside` gives what the scripts define.
const inside = (name) => vm.runInThisContext(name);
const make = (spec) => new (inside("Tokenizer"))(spec);
const direct = {
  encode: ({spec, list}) => list.map((text) => make(spec).encode(text)),
  decode: ({spec, list}) => list.map((ids) => make(spec).decode(ids)),
  preprocess: ({image, size}) => [...inside("preprocess")(image, size)],
  tensors: ({stage}) => {
    const index = inside("engine").settings.tensors[stage];
    const {buffer} = Uint8Array.from(Buffer.from(texts.weights, "base64"));
    const read = inside("read_tensors")(index, buffer);
    return Object.fromEntries(Object.keys(index).map((name) => [name, [...read(name).data]]));
  },
};

async function run(method, options) {
  if (direct[method]) return direct[method](options);
  const engine = inside("engine");
  if (method !== "answer") return engine[method](options);
  const tokens = [];
  const result = await engine.answer({...options, onToken: (token) => tokens.push(token)});
  return {...result, tokens};
}

(async () => {
  const results = [];
  for (const [method, options] of JSON.parse(calls)) results.push(await run(method, options));
  fs.writeSync(1, JSON.stringify(results));
})();
