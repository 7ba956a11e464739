// The whole model in plain JavaScript: what tokenizer.py, vision.py, model.py, data.py and
// generate.py compute for one sample, in that order and with their names. T vectors are one
// Float32Array.
//
// Dimensions: T tokens, C width, H query heads, K key-value heads, D head dim, V vocabulary,
// S image size, P patch size, N patches, and n cached tokens.
"use strict";

// ------------------------------------------------------------------------ tokenizer.py
const SPACE = "▁";
const [NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE] = [1, 2, 3, 4, 6]; // types of pieces

class Tokenizer {
  // spec: pieces, scores and types (arrays), and settings: see export.py.
  constructor(spec) {
    Object.assign(this, spec);
    this.ids = new Map(this.pieces.map((piece, id) => [piece, id]));
    const is_text = (_, id) => [NORMAL, USER_DEFINED].includes(this.types[id]);
    const texts = this.pieces.filter(is_text);
    this.merges = new Map(texts.map((piece) => [piece, this.scores[this.ids.get(piece)]]));
    this.user_defined = this.pieces.filter((_, id) => this.types[id] === USER_DEFINED);
    this.user_defined.sort((a, b) => [...b].length - [...a].length);
  }

  // Text -> pieces: the textbook's BPE. A character that is no piece becomes its bytes.
  cut(text) {
    text = text.replace(/\p{Surrogate}/gu, "\ufffd");
    if (this.remove_extra_whitespaces) text = text.replace(/^ +| +$/g, "").replace(/ +/g, " ");
    if (!text) return [];
    text = (this.add_dummy_prefix ? SPACE : "") + text.replaceAll(" ", SPACE);
    if (this.remove_extra_whitespaces) text = text.replace(/▁+$/, "");

    const pieces = [];
    for (const part of this.split(text)) {
      for (const symbol of this.user_defined.includes(part) ? [part] : this.bpe(part)) {
        if (this.merges.has(symbol)) pieces.push(symbol);
        else if (this.byte_fallback) pieces.push(...byte_pieces(symbol));
        else if (pieces.at(-1) !== this.pieces[this.unk_id]) pieces.push(this.pieces[this.unk_id]);
      }
    }
    return pieces;
  }

  // User-defined pieces are cut out first, the longest at each position.
  split(text) {
    if (!this.user_defined.length) return [text];
    const escaped = this.user_defined.map((piece) => piece.replace(/[^\p{L}\p{N}▁]/gu, "\\$&"));
    return text.split(new RegExp(`(${escaped.join("|")})`)).filter(Boolean);
  }

  // Merge the neighbours with the best score, the leftmost first.
  bpe(text) {
    const symbols = [...text]; // by code points, as in Python
    for (;;) {
      let [best, at] = [-Infinity, -1];
      for (let i = 0; i + 1 < symbols.length; i++) {
        const score = this.merges.get(symbols[i] + symbols[i + 1]);
        if (score > best) [best, at] = [score, i];
      }
      if (at < 0) return symbols;
      symbols.splice(at, 2, symbols[at] + symbols[at + 1]);
    }
  }

  encode(text) {
    return this.cut(text).map((piece) => this.ids.get(piece));
  }

  decode(ids) {
    const stream = new StreamDecoder(this);
    return ids.map((id) => stream.push(id)).join("") + stream.flush();
  }
}

function byte_pieces(text) {
  const hex = (byte) => byte.toString(16).toUpperCase().padStart(2, "0");
  return [...new TextEncoder().encode(text)].map((byte) => `<0x${hex(byte)}>`);
}

// Ids, one at a time -> text, as soon as it is certain: never half a syllable.
class StreamDecoder {
  constructor(tokenizer) {
    Object.assign(this, {tokenizer, pending: [], started: false});
  }

  push(id) {
    const {types, pieces, unk_surface, ...settings} = this.tokenizer;
    if (types[id] === BYTE) {
      this.pending.push(parseInt(pieces[id].slice(3, 5), 16));
      return this.take_characters();
    }

    // Any other piece ends a run of bytes.
    const out = this.flush();
    if (types[id] === CONTROL) return out;
    let text = types[id] === UNKNOWN ? unk_surface : pieces[id];
    if (types[id] !== UNKNOWN) {
      const padded = settings.add_dummy_prefix || settings.remove_extra_whitespaces;
      if (!this.started && padded) text = text.replace(/^▁/, "");
      text = text.replaceAll(SPACE, " ");
    }
    this.started = text !== "" || !settings.remove_extra_whitespaces;
    return out + text;
  }

  // The complete characters of `pending`. Each impossible byte becomes U+FFFD.
  take_characters(final = false) {
    let out = "";
    while (this.pending.length) {
      const size = 1 + [0x80, 0xe0, 0xf0].filter((limit) => this.pending[0] >= limit).length;
      const bytes = new Uint8Array(this.pending.slice(0, size));
      try {
        out += new TextDecoder("utf-8", {fatal: true, ignoreBOM: true}).decode(bytes);
        this.pending.splice(0, size);
      } catch {
        if (!final && bytes.length < size) break;
        out += "\ufffd";
        this.pending.shift();
      }
    }
    this.started ||= out !== "";
    return out;
  }

  flush() {
    return this.take_characters(true);
  }
}

// ------------------------------------------------------------------------ vision.py
const CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073];
const CLIP_STD = [0.26862954, 0.26130258, 0.27577711];
const MEAN_COLOUR = [122, 116, 104];

// Pillow's bicubic filter, pixel for pixel: per output pixel the first input pixel and the weights,
// as whole numbers (22 bits behind the point).
function bicubic_weights(size, new_size) {
  const scale = size / new_size;
  const stretch = Math.max(scale, 1); // a smaller image averages over more pixels
  const cubic = (x) => {
    x = Math.abs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? ((x - 5) * x + 8) * x * -0.5 + 2 : 0;
  };
  return Array.from({length: new_size}, (_, i) => {
    const centre = (i + 0.5) * scale;
    const start = Math.max(0, Math.trunc(centre - 2 * stretch + 0.5));
    const end = Math.min(size, Math.trunc(centre + 2 * stretch + 0.5));
    const weights = [];
    for (let x = start; x < end; x++) weights.push(cubic((x - centre + 0.5) / stretch));
    const total = sum(weights);
    const whole = (value) => Math.trunc(value * 2 ** 22 + Math.sign(value) * 0.5);
    return {start, weights: weights.map((weight) => whole(weight / total))};
  });
}

// Resizes lines of pixels. A value [line, i, channel] lies at line·a + i·b + channel·c.
function resize(source, from, target, to, lines, weights) {
  for (let line = 0; line < lines; line++) {
    for (let i = 0; i < weights.length; i++) {
      for (let channel = 0; channel < 3; channel++) {
        let at = line * from[0] + weights[i].start * from[1] + channel * from[2];
        let total = 1 << 21; // rounds
        for (const weight of weights[i].weights) {
          total += source[at] * weight;
          at += from[1];
        }
        target[line * to[0] + i * to[1] + channel * to[2]] = total >> 22; // the array clips it
      }
    }
  }
}

// An image {data: RGBA, width, height} -> uint8 (3, size, size): "pad" of vision.preprocess.
function preprocess({data, width, height}, size) {
  const side = Math.max(width, height);
  const left = (side - width) >> 1;
  const top = (side - height) >> 1;
  const weights = bicubic_weights(side, size);
  const [row, narrow] = [side, side * size].map((pixels) => new Uint8ClampedArray(3 * pixels));
  for (const pixels of [row, narrow]) pixels.forEach((_, i) => { pixels[i] = MEAN_COLOUR[i % 3]; });

  // Along x, row by row; then along y.
  for (let y = 0; y < height; y++) {
    for (let i = 0; i < 3 * width; i++) {
      row[3 * left + i] = data[4 * (y * width + Math.trunc(i / 3)) + (i % 3)];
    }
    const target = narrow.subarray(3 * size * (top + y));
    resize(row, [0, 3, 1], target, [0, 3, 1], 1, weights);
  }
  const pixels = new Uint8ClampedArray(3 * size * size);
  resize(narrow, [3, 3 * size, 1], pixels, [1, size, size * size], size, weights);
  return pixels;
}

// uint8 (3, S, S) -> (x / 255 − mean) / std, per colour channel.
function normalise(pixels) {
  const channel = (i) => Math.trunc(3 * i / pixels.length);
  return Float32Array.from(pixels, (value, i) =>
    (value / 255 - CLIP_MEAN[channel(i)]) / CLIP_STD[channel(i)]);
}

// The layers that torch.nn has. `tensors` is a function: name -> {data, shape}, or undefined.
class Linear {
  constructor(tensors, name) {
    this.weight = tensors(`${name}.weight`);
    this.bias = tensors(`${name}.bias`);
  }

  forward(x) {
    return linear(x, this.weight, this.bias?.data);
  }
}

// x (T, in) @ weight.T (in, out) + bias -> (T, out)
function linear(x, {data, shape}, bias) {
  const [rows, columns] = [shape[0], data.length / shape[0]];
  const T = x.length / columns;
  const y = new Float32Array(T * rows);
  for (let t = 0; t < T; t++) {
    for (let row = 0; row < rows; row++) {
      let total = bias ? bias[row] : 0;
      for (let i = 0; i < columns; i++) total += data[row * columns + i] * x[t * columns + i];
      y[t * rows + row] = total;
    }
  }
  return y;
}

class LayerNorm {
  constructor(tensors, name, eps) {
    this.weight = tensors(`${name}.weight`).data;
    this.bias = tensors(`${name}.bias`).data;
    this.eps = eps;
  }

  forward(x) {
    return map_rows(x, this.weight.length, (row) => {
      const mean = sum(row) / row.length;
      const variance = sum(row.map((value) => (value - mean) ** 2)) / row.length;
      const scale = 1 / Math.sqrt(variance + this.eps);
      return row.map((value, i) => (value - mean) * scale * this.weight[i] + this.bias[i]);
    });
  }
}

function map_rows(x, columns, change) {
  const y = new Float32Array(x.length);
  for (let at = 0; at < x.length; at += columns) y.set(change(x.subarray(at, at + columns)), at);
  return y;
}

const sum = (values) => values.reduce((total, value) => total + value, 0);
const add = (x, y) => x.map((value, i) => value + y[i]);
const quick_gelu = (x) => x / (1 + Math.exp(-1.702 * x));
const silu = (x) => x / (1 + Math.exp(-x));

// x · Φ(x), with the error function to 1.5e-7 (Abramowitz and Stegun, 7.1.26).
function gelu(x) {
  const z = Math.abs(x) / Math.SQRT2;
  const t = 1 / (1 + 0.3275911 * z);
  const series = [1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592];
  const erf = 1 - series.reduce((total, a) => total * t + a, 0) * t * Math.exp(-z * z);
  return 0.5 * x * (1 + Math.sign(x) * erf);
}

const ACTIVATIONS = {quick_gelu, gelu};

function softmax(scores) {
  const most = scores.reduce((a, b) => Math.max(a, b), -Infinity);
  const p = scores.map((score) => Math.exp(score - most));
  const total = sum(p);
  return p.map((value) => value / total);
}

// q (T, H, D), k and v (n, K, D) -> (T, H, D). causal: the last query attends to all n keys, the
// one before to one less … weights, if given, gets the last query's: per head, (n,).
function attention(q, k, v, {H, K, D, causal, weights}) {
  const [T, n] = [q.length / (H * D), k.length / (K * D)];
  const out = new Float32Array(q.length);
  for (let t = 0; t < T; t++) {
    const visible = causal ? n - T + t + 1 : n;
    for (let h = 0; h < H; h++) {
      const at = (t * H + h) * D;
      const head = Math.trunc(h * K / H) * D; // H / K queries share a key head
      const scores = new Float32Array(visible);
      for (let s = 0; s < visible; s++) {
        let dot = 0;
        for (let d = 0; d < D; d++) dot += q[at + d] * k[s * K * D + head + d];
        scores[s] = dot / Math.sqrt(D);
      }
      const p = softmax(scores);
      for (let s = 0; s < visible; s++) {
        for (let d = 0; d < D; d++) out[at + d] += p[s] * v[s * K * D + head + d];
      }
      if (weights && t === T - 1) weights.push(p);
    }
  }
  return out;
}

class VisionAttention {
  constructor(config, tensors, name) {
    const H = config.num_attention_heads;
    this.shape = {H, K: H, D: config.hidden_size / H, causal: false};
    this.q_proj = new Linear(tensors, `${name}.q_proj`);
    this.k_proj = new Linear(tensors, `${name}.k_proj`);
    this.v_proj = new Linear(tensors, `${name}.v_proj`);
    this.out_proj = new Linear(tensors, `${name}.out_proj`);
  }

  forward(x) {
    const [q, k, v] = [this.q_proj, this.k_proj, this.v_proj].map((layer) => layer.forward(x));
    return this.out_proj.forward(attention(q, k, v, this.shape));
  }
}

class VisionBlock {
  constructor(config, tensors, name) {
    this.norm1 = new LayerNorm(tensors, `${name}.norm1`, config.layer_norm_eps);
    this.attn = new VisionAttention(config, tensors, `${name}.attn`);
    this.norm2 = new LayerNorm(tensors, `${name}.norm2`, config.layer_norm_eps);
    this.fc1 = new Linear(tensors, `${name}.fc1`);
    this.fc2 = new Linear(tensors, `${name}.fc2`);
    this.act = ACTIVATIONS[config.hidden_act];
  }

  forward(x) {
    x = add(x, this.attn.forward(this.norm1.forward(x)));
    return add(x, this.fc2.forward(this.fc1.forward(this.norm2.forward(x)).map(this.act)));
  }
}

class ViT {
  constructor(config, tensors) {
    this.config = config;
    this.class_embed = tensors("vision.class_embed").data;
    this.patch_embed = tensors("vision.patch_embed.weight");
    this.pos_embed = tensors("vision.pos_embed").data;
    this.pre_norm = new LayerNorm(tensors, "vision.pre_norm", config.layer_norm_eps);
    this.layers = Array.from({length: config.num_hidden_layers}, (_, i) =>
      new VisionBlock(config, tensors, `vision.layers.${i}`));
  }

  // uint8 (3, S, S) -> hidden states (1 + N, C), the class token first. layer: as in vision.py.
  forward(pixels, layer) {
    let x = this.embed_patches(normalise(pixels)); // (N, C)
    x = Float32Array.from([...this.class_embed, ...x]); // (1 + N, C)
    x = this.pre_norm.forward(add(x, this.pos_embed));
    const count = this.layers.length + 1;
    for (const block of this.layers.slice(0, (layer + count) % count)) x = block.forward(x);
    return x;
  }

  // (3, S, S) -> (N, C): each patch as a row of 3·P·P values, times the convolution's weights.
  embed_patches(x) {
    const {image_size: S, patch_size: P} = this.config;
    const patches = [];
    for (let top = 0; top < S; top += P) {
      for (let left = 0; left < S; left += P) {
        for (let i = 0; i < 3 * P * P; i++) {
          const [channel, row] = [Math.trunc(i / (P * P)), Math.trunc(i / P) % P];
          patches.push(x[channel * S * S + (top + row) * S + left + (i % P)]);
        }
      }
    }
    return linear(Float32Array.from(patches), this.patch_embed);
  }
}

// ------------------------------------------------------------------------ model.py
class RMSNorm {
  constructor(tensors, name, eps) {
    this.weight = tensors(`${name}.weight`).data;
    this.eps = eps;
  }

  forward(x) {
    return map_rows(x, this.weight.length, (row) => {
      const mean = sum(row.map((value) => value * value)) / row.length;
      const scale = 1 / Math.sqrt(mean + this.eps);
      return row.map((value, i) => value * scale * this.weight[i]);
    });
  }
}

// Rotates the pairs (i, i + D/2) of each head of x (T, H, D), in place. start: the first position.
function rope(x, heads, D, start, theta) {
  for (let at = 0; at < x.length; at += D) {
    const position = start + Math.trunc(at / (heads * D));
    for (let i = 0; i < D / 2; i++) {
      const angle = position * theta ** (-2 * i / D);
      const [cos, sin, a, b] = [Math.cos(angle), Math.sin(angle), x[at + i], x[at + i + D / 2]];
      x[at + i] = a * cos - b * sin;
      x[at + i + D / 2] = b * cos + a * sin;
    }
  }
  return x;
}

class Attention {
  constructor(config, tensors, name) {
    [this.H, this.K] = [config.num_attention_heads, config.num_key_value_heads];
    [this.D, this.theta] = [config.head_dim, config.rope_theta];
    this.q_proj = new Linear(tensors, `${name}.q_proj`);
    this.o_proj = new Linear(tensors, `${name}.o_proj`);
    this.k_proj = new Linear(tensors, `${name}.k_proj`);
    this.v_proj = new Linear(tensors, `${name}.v_proj`);
  }

  // x (T, C) -> (T, C). cache: this layer's k and v (size, K, D), and length.
  forward(x, cache) {
    const {H, K, D, theta} = this;
    const q = rope(this.q_proj.forward(x), H, D, cache.length, theta);
    const k = rope(this.k_proj.forward(x), K, D, cache.length, theta);

    // Append k and v to the cache, then attend to everything cached.
    cache.k.set(k, cache.length * K * D);
    cache.v.set(this.v_proj.forward(x), cache.length * K * D);
    const end = cache.length * K * D + k.length;
    cache.weights.length = 0;
    const shape = {H, K, D, causal: true, weights: cache.weights};
    const out = attention(q, cache.k.subarray(0, end), cache.v.subarray(0, end), shape);
    cache.length += x.length / (this.q_proj.weight.data.length / (H * D));
    return this.o_proj.forward(out);
  }
}

class MLP {
  constructor(tensors, name) {
    this.gate_proj = new Linear(tensors, `${name}.gate_proj`);
    this.up_proj = new Linear(tensors, `${name}.up_proj`);
    this.down_proj = new Linear(tensors, `${name}.down_proj`);
  }

  forward(x) {
    const up = this.up_proj.forward(x);
    return this.down_proj.forward(this.gate_proj.forward(x).map((gate, i) => silu(gate) * up[i]));
  }
}

class Block {
  constructor(config, tensors, name) {
    this.attn_norm = new RMSNorm(tensors, `${name}.attn_norm`, config.rms_norm_eps);
    this.mlp_norm = new RMSNorm(tensors, `${name}.mlp_norm`, config.rms_norm_eps);
    this.attn = new Attention(config, tensors, `${name}.attn`);
    this.mlp = new MLP(tensors, `${name}.mlp`);
  }

  forward(x, cache) {
    x = add(x, this.attn.forward(this.attn_norm.forward(x), cache));
    return add(x, this.mlp.forward(this.mlp_norm.forward(x)));
  }
}

class Decoder {
  constructor(config, tensors) {
    this.norm = new RMSNorm(tensors, "decoder.norm", config.rms_norm_eps);
    this.embed_tokens = tensors("decoder.embed_tokens.weight");
    this.layers = Array.from({length: config.num_hidden_layers}, (_, i) =>
      new Block(config, tensors, `decoder.layers.${i}`));
    this.lm_head = tensors("decoder.lm_head.weight") ?? this.embed_tokens; // tied
  }

  // (T, C) -> hidden states (T, C) after the last norm. The cache grows by T.
  forward(x, cache) {
    this.layers.forEach((block, i) => { x = block.forward(x, cache[i]); });
    return this.norm.forward(x);
  }
}

// Per layer: keys and values (size, K, D), the number of cached tokens, and the attention weights
// of the last query, per head (n,).
function make_cache(config, size) {
  const length = size * config.num_key_value_heads * config.head_dim;
  return Array.from({length: config.num_hidden_layers}, () =>
    ({k: new Float32Array(length), v: new Float32Array(length), length: 0, weights: []}));
}

class Projector {
  constructor(tensors) {
    this.layers = [0, 2].map((i) => new Linear(tensors, `projector.${i}`));
  }

  forward(x) {
    return this.layers[1].forward(this.layers[0].forward(x).map(gelu));
  }
}

class XLlava {
  constructor(config, tensors) {
    this.config = config;
    this.vision = new ViT(config.vision, tensors);
    this.projector = new Projector(tensors);
    this.decoder = new Decoder(config.text, tensors);
  }

  // uint8 (3, S, S) -> image features (N, C) for the decoder, without the class token.
  encode_images(pixels) {
    const hidden = this.vision.forward(pixels, this.config.vision_feature_layer);
    return this.projector.forward(hidden.subarray(this.config.vision.hidden_size));
  }

  // Ids (T,) -> (T, C): token embeddings, and the image's features at its <image> tokens.
  embed_inputs(ids, pixels) {
    const C = this.config.text.hidden_size;
    const features = pixels && this.encode_images(pixels);
    const x = new Float32Array(ids.length * C);
    let patch = 0;
    ids.forEach((id, t) => {
      const is_image = features && id === this.config.image_token_id;
      const [rows, row] = is_image ? [features, patch++] : [this.decoder.embed_tokens.data, id];
      x.set(rows.subarray(row * C, (row + 1) * C), t * C);
    });
    return x;
  }

  forward(ids, pixels, cache) {
    return this.decoder.forward(this.embed_inputs(ids, pixels), cache);
  }

  logits(hidden) {
    return linear(hidden, this.decoder.lm_head);
  }
}

// ------------------------------------------------------------------------ data.py
// Ids of a conversation that ends with a question. turns: [[parts of the question, answer or null]]
// with an image between each two parts. chat: vocabulary/chat_markers.py's ChatMarkers.
function encode_chat(turns, tokenizer, chat, num_patches) {
  const ids = [...chat.begin];
  turns.forEach(([question, answer], n) => {
    const parts = [...question];
    parts[0] = (n ? chat.question_prefix : chat.first_prefix) + parts[0];
    parts[parts.length - 1] += chat.question_suffix;
    ids.push(...chat.turn);
    parts.forEach((part, i) => {
      if (i > 0) ids.push(...Array(num_patches).fill(tokenizer.image_id));
      ids.push(...tokenizer.encode(part));
    });
    ids.push(...chat.reply);
    if (answer !== null) {
      ids.push(...tokenizer.encode(chat.answer_prefix + answer), tokenizer.eos_id);
      ids.push(...chat.next_turn);
    }
  });
  return ids;
}

// ------------------------------------------------------------------------ generate.py
// Yields {token, p (V,), weights [layer][head] (n,)} for each token, null for the end.
function* generate(model, prompt, pixels, {max_new_tokens = 128, eos_id = 2, temperature = 0}) {
  const cache = make_cache(model.config.text, prompt.length + max_new_tokens);
  const C = model.config.text.hidden_size;
  let hidden = model.forward(prompt, pixels, cache).subarray(-C);
  for (let n = 0; n < max_new_tokens; n++) {
    const p = softmax(model.logits(hidden));
    const token = sample_token(p, temperature);
    const weights = cache.map((layer) => [...layer.weights]);
    yield {token: token === eos_id ? null : token, p, weights};
    if (token === eos_id) return;
    hidden = model.forward([token], null, cache);
  }
}

// The most probable token, or a draw: the probabilities to the power of 1 / temperature.
function sample_token(p, temperature) {
  if (temperature < 1e-3) return p.indexOf(p.reduce((a, b) => Math.max(a, b)));
  const powers = p.map((value) => value ** (1 / temperature));
  let left = Math.random() * sum(powers);
  return Math.max(0, powers.findIndex((power) => (left -= power) < 0));
}

// evaluation/heatmap.py: the cosines of a phrase and the patches, then 0 at the median, 1 at most.
function word_heat(model, tokenizer, pixels, word) {
  const C = model.config.text.hidden_size;
  const phrase = new Float32Array(C);
  for (const id of tokenizer.encode(word)) {
    phrase.forEach((_, i) => { phrase[i] += model.decoder.embed_tokens.data[id * C + i]; });
  }
  const features = model.encode_images(pixels);
  const length = (x) => Math.hypot(...x);
  const scores = Array.from({length: features.length / C}, (_, i) => {
    const patch = features.subarray(i * C, (i + 1) * C);
    return sum(patch.map((value, c) => value * phrase[c])) / (length(patch) * length(phrase));
  });
  const sorted = [...scores].sort((a, b) => a - b);
  const median = (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
  const best = Math.max(sorted.at(-1) - median, 0.2);
  return scores.map((score) => Math.max(0, score - median) / best);
}

// ------------------------------------------------------------------------ the weights
// index: {name: [shape, offset]}. -> a function that gives a tensor as float32. Vectors are stored
// so; of a matrix, a scale for each row, then the rows in int8.
function read_tensors(index, buffer) {
  return (name) => {
    if (!(name in index)) return undefined;
    const [shape, offset] = index[name];
    const rows = shape[0];
    const vector = new Float32Array(buffer.slice(offset, offset + 4 * rows));
    if (shape.length === 1) return {shape, data: vector};

    const columns = shape.slice(1).reduce((a, b) => a * b);
    const whole = new Int8Array(buffer, offset + 4 * rows, rows * columns);
    const scaled = (value, i) => value * vector[Math.trunc(i / columns)];
    return {shape, data: Float32Array.from(whole, scaled)};
  };
}
