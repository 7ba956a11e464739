// The `engine` of an exported page (page.js lists the methods): model.js in a worker, so that the
// page stays responsive. Nothing leaves the page.
"use strict";

const engine = (() => {
  const text = (id) => document.getElementById(id).textContent;
  const settings = JSON.parse(text("settings"));

  // The worker is made of text, as a file:// page may not load one.
  const source = new Blob([text("model"), `(${work})();`], {type: "text/javascript"});
  const worker = new Worker(URL.createObjectURL(source));
  worker.postMessage({settings, weights: text("weights")});
  const waiting = new Map(); // number of the request -> {resolve, reject, onToken}
  let count = 0;

  worker.onmessage = ({data: {number, token, result, error}}) => {
    const request = waiting.get(number);
    if (!request) return; // stopped
    if (token) return request.onToken(token);
    waiting.delete(number);
    if (error) request.reject(new Error(error));
    else request.resolve(result);
  };

  worker.onerror = ({message}) => {
    for (const {reject} of waiting.values()) reject(new Error(message));
  };

  function call(method, options, onToken) {
    const number = count++;
    return new Promise((resolve, reject) => {
      waiting.set(number, {resolve, reject, onToken});
      worker.postMessage({number, method, options});
    });
  }

  async function answer({image, blind, signal, onToken, ...options}) {
    const shown = image && !blind ? await readImage(image) : null;
    const number = count;
    const done = call("answer", {...options, image: shown}, onToken);
    const stop = () => {
      worker.postMessage({stop: number});
      waiting.get(number)?.reject(new DOMException("stopped", "AbortError"));
      waiting.delete(number);
    };
    if (signal?.aborted) stop();
    signal?.addEventListener("abort", stop);
    return done.finally(() => signal?.removeEventListener("abort", stop));
  }

  // A data URL -> RGBA pixels, upright, on CLIP's mean colour where it is transparent. The browser
  // shrinks what is larger than 2,048 pixels; all else is as in vision.py.
  async function readImage(url) {
    const image = new Image();
    image.src = url;
    try {
      await image.decode();
    } catch {
      throw new Error("this browser cannot read the image");
    }
    const shrink = Math.min(1, 2048 / Math.max(image.width, image.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(image.width * shrink));
    canvas.height = Math.max(1, Math.round(image.height * shrink));
    const context = canvas.getContext("2d");
    context.fillStyle = "rgb(122, 116, 104)";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    const {data, width, height} = context.getImageData(0, 0, canvas.width, canvas.height);
    return {data, width, height};
  }

  return {
    settings,
    info: async () => settings.info,
    answer,
    attention: (options) => call("attention", options),
    pieces: (options) => call("pieces", options),
    heat: async (options) => call("heat", {...options, image: await readImage(options.image)}),
  };

  // ------------------------------------------------------------------------ inside the worker
  function work() {
    let page, buffer, tokenizers;
    let loaded = {}; // {stage, model}: one stage in memory
    let maps = []; // of the last answer that had an image: per token [layer][head][patch]
    const stopped = new Set();
    // What Python's strip() takes: trim() leaves \x1c to \x1f, which a byte piece may be.
    const [START, END] = [/^[\s\x1c-\x1f\x85]+/, /[\s\x1c-\x1f\x85]+$/];

    function start(settings, weights) {
      page = settings;
      buffer = Uint8Array.from(atob(weights), (char) => char.charCodeAt(0)).buffer;
      const spec = page.tokenizer;
      const first = (list) => list.slice(0, page.base_size);
      const base = {...spec, pieces: first(spec.pieces), types: first(spec.types)};
      tokenizers = {base: page.base_size && new Tokenizer(base), expanded: new Tokenizer(spec)};
    }

    function load(stage) {
      if (loaded.stage !== stage) {
        loaded = {stage, model: new XLlava(page.config, read_tensors(page.tensors[stage], buffer))};
      }
      return loaded.model;
    }

    const read_pixels = (image) => image && preprocess(image, page.config.vision.image_size);
    const grid = () => Array(2).fill(page.config.vision.image_size / page.config.vision.patch_size);
    const mean = (rows) => rows[0].map((_, i) => sum(rows.map((row) => row[i])) / rows.length);

    const methods = {
      // aside: another answer stays the one that `attention` is about.
      async answer({stage, messages, image, temperature, maxTokens, aside, number}) {
        const [model, tokenizer] = [load(stage), tokenizers.expanded];
        const num_patches = grid()[0] ** 2;
        const turns = read_turns(messages, Boolean(image));
        const prompt = encode_chat(turns, tokenizer, page.chat, num_patches);
        const left = page.config.text.max_position_embeddings - prompt.length;
        if (left < 1) throw new Error(`${prompt.length} tokens are too many: start a new one`);

        const first = prompt.indexOf(tokenizer.image_id);
        const eos_id = tokenizer.eos_id;
        const options = {max_new_tokens: Math.min(maxTokens, left), eos_id, temperature};
        const decoder = new StreamDecoder(tokenizer);
        let [answer, finish] = ["", "length"];
        const recorded = [];
        if (image && !aside) maps = recorded;
        for (const step of generate(model, prompt, read_pixels(image), options)) {
          if (step.token === null) {
            finish = "stop";
            break;
          }
          let text = decoder.push(step.token);
          if (!answer) text = text.replace(START, "");
          answer += text;
          const token = {...describe(step, tokenizer), text, attention: null, grid: grid()};
          if (image) {
            const patches = (weights) => [...weights.subarray(first, first + num_patches)];
            recorded.push(step.weights.map((heads) => heads.map(patches)));
            token.attention = mean(recorded.at(-1).flat());
          }
          postMessage({number, token});
          await new Promise((resolve) => setTimeout(resolve)); // a "stop" may have arrived
          if (stopped.delete(number)) return null;
        }
        return {text: (answer + decoder.flush()).replace(START, "").replace(END, ""), finish};
      },

      // The mean over the layers and heads that are not chosen.
      async attention({token, layer, head}) {
        const chosen = (list, i) => (i === null ? list : [list[i]]);
        return mean(chosen(maps[token], layer).flatMap((heads) => chosen(heads, head)));
      },

      async pieces({text}) {
        return Object.entries(tokenizers).filter(([, each]) => each).map(([tokenizer, each]) =>
          ({tokenizer, pieces: each.cut(text)}));
      },

      async heat({stage, word, image}) {
        const scores = word_heat(load(stage), tokenizers.expanded, read_pixels(image), word);
        return {grid: grid(), scores};
      },
    };

    // Messages -> turns as encode_chat takes them. The image goes with the first question.
    function read_turns(messages, has_image) {
      const turns = [];
      for (const {role, text} of messages) {
        const shown = has_image && !turns.length;
        if (role === "assistant") turns.at(-1)[1] = text.trim();
        else turns.push([shown ? ["", "\n" + text.trim()] : [text.trim()], null]);
      }
      return turns;
    }

    // The token's name and probability, and the next four.
    function describe({token, p}, tokenizer) {
      const order = [...p.keys()].sort((a, b) => p[b] - p[a]).filter((id) => id !== token);
      const alternatives = order.slice(0, 4).map((id) =>
        ({text: tokenizer.pieces[id], probability: p[id]}));
      return {id: token, piece: tokenizer.pieces[token], probability: p[token], alternatives};
    }

    onmessage = async ({data: {settings, weights, number, method, options, stop}}) => {
      if (settings) return start(settings, weights);
      if (stop !== undefined) return stopped.add(stop);
      try {
        postMessage({number, result: await methods[method]({...options, number})});
      } catch (error) {
        postMessage({number, error: error.message});
      }
    };
  }
})();
