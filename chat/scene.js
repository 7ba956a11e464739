// What only an exported page has: scenes to draw, and a slider over the stages. It uses page.js's
// functions.
"use strict";

const SCENE_WORDS = {
  en: {
    draw: "Draw a scene", clear: "Clear", never: "no training image shows this pair",
    how: "Choose a thing and a colour, then tap on the image. Drag it to move it.",
    place: "In the centre; arrow keys move it", slide: "One question, stage by stage",
  },
  ko: {
    draw: "장면 그리기", clear: "지우기", never: "학습 이미지에 없던 조합",
    how: "사물과 색을 고르고 이미지를 누르세요. 끌면 옮겨집니다.",
    place: "가운데에 놓기, 화살표로 이동", slide: "질문 하나, 단계마다",
  },
  zh: {
    draw: "画一个场景", clear: "清除", never: "训练图像中没有的组合",
    how: "选择物体和颜色，再点按图像上的位置。拖动即可移动。",
    place: "放在中间，用方向键移动", slide: "一个问题，逐个阶段",
  },
};
const sceneWords = SCENE_WORDS[language];
const MOST_THINGS = 3; // as in training

// ---------------------------------------------------------------------------- demo/drawing.py
// things: {kind, colour, size, x, y}, in pixels of the drawing.
class Drawing {
  constructor(settings) {
    Object.assign(this, settings, {things: [], background: "day", sprites: {}});
    this.canvas = element("canvas");
    this.canvas.width = this.canvas.height = this.side;
    this.context = this.canvas.getContext("2d", {willReadFrequently: true});
  }

  async load() {
    this.sheet = await loadImage(this.atlas.url);
    this.images = {};
    for (const [name, url] of Object.entries(this.backgrounds)) {
      this.images[name] = await loadImage(url);
    }
  }

  draw() {
    this.context.drawImage(this.images[this.background], 0, 0);
    for (const thing of this.things) this.draw_thing(this.context, thing, this.side);
  }

  // A thing's silhouette in its colour, in a thin halo, around the point x, y.
  draw_thing(context, {kind, colour, size, x, y}, side) {
    const full = Math.round(this.sizes[size] * 1.25); // with a margin of an eighth on every side
    const {shade, alpha, halo} = this.sprites[kind + full] ??= this.sprite(kind, full);
    const dark = ["white", "yellow"].includes(colour);
    const edge = 3 - Math.trunc(full / 10);
    const [left, top] = [x, y].map((centre) =>
      Math.max(edge, Math.min(side - full - edge, Math.round(centre - full / 2))));

    const pixels = context.getImageData(left, top, full, full);
    paste(pixels.data, halo, () => (dark ? [70, 74, 92] : [255, 255, 255]));
    paste(pixels.data, alpha, (i) => this.colour_in(shade[i], colour));
    context.putImageData(pixels, left, top);
  }

  // A tile of the atlas, scaled: its shade, alpha and halo, one number a pixel.
  sprite(kind, full) {
    const {tile, columns} = this.atlas;
    const number = Object.keys(this.held_out).indexOf(kind);
    const context = element("canvas").getContext("2d");
    context.canvas.width = context.canvas.height = full;
    context.imageSmoothingQuality = "high";
    const source = [(number % columns) * tile, Math.trunc(number / columns) * tile, tile, tile];
    context.drawImage(this.sheet, ...source, full / 10, full / 10, full * 0.8, full * 0.8);
    const {data} = context.getImageData(0, 0, full, full);
    const channel = (c) => Float32Array.from({length: full * full}, (_, i) => data[4 * i + c]);
    const halo = blur(widen(channel(3), full), full).map((a) => Math.min(255, 2 * a));
    return {shade: channel(0), alpha: channel(3), halo};
  }

  // Dark shades darken the colour, light ones lighten it; 128 is the plain colour.
  colour_in(v, colour) {
    const depth = colour === "white" ? 0.38 : 0.6;
    const shine = ["black", "white", "yellow"].includes(colour) ? 0.3 : 0.4;
    return this.colours[colour].map((value) => (v < 128
      ? value * (1 - depth * (1 - v / 128) ** 1.4)
      : value + (255 - value) * shine * ((v - 128) / 127) ** 2));
  }

  // To the nearest of the nine places, as near to its centre as in training.
  settle(thing) {
    for (const axis of ["x", "y"]) {
      const cell = this.side / 3;
      const centre = (Math.max(0, Math.min(2, Math.trunc(thing[axis] / cell))) + 0.5) * cell;
      const jitter = this.jitter[thing.size];
      thing[axis] = Math.max(centre - jitter, Math.min(centre + jitter, thing[axis]));
    }
  }

  // The topmost thing at a point.
  find({x, y}) {
    const reach = (thing) => this.sizes[thing.size] / 2;
    return this.things.findLast((thing) =>
      Math.abs(thing.x - x) < reach(thing) && Math.abs(thing.y - y) < reach(thing));
  }

  add(thing) {
    this.things = [...this.things.slice(1 - MOST_THINGS), thing];
    return thing;
  }
}

async function loadImage(url) {
  const loaded = Object.assign(new Image(), {src: url});
  await loaded.decode();
  return loaded;
}

// Each pixel becomes the largest of its 3 × 3 neighbours.
function widen(alpha, side) {
  return alpha.map((_, i) => Math.max(...neighbours(alpha, i, side).map(([value]) => value)));
}

// A box of radius 0.6: the neighbours count 0.6.
function blur(alpha, side) {
  return alpha.map((_, i) => {
    let [total, weights] = [0, 0];
    for (const [value, steps] of neighbours(alpha, i, side)) {
      total += value * 0.6 ** steps;
      weights += 0.6 ** steps;
    }
    return total / weights;
  });
}

// [value, steps along x and y] of a pixel and those around it.
function neighbours(values, i, side) {
  const found = [];
  for (let dy = -1; dy <= 1; dy++) {
    for (let dx = -1; dx <= 1; dx++) {
      const [x, y] = [(i % side) + dx, Math.trunc(i / side) + dy];
      if (x < 0 || y < 0 || x >= side || y >= side) continue;
      found.push([values[y * side + x], Math.abs(dx) + Math.abs(dy)]);
    }
  }
  return found;
}

function paste(data, alpha, colour) {
  alpha.forEach((a, i) => {
    if (!a) return;
    colour(i).forEach((value, c) => {
      data[4 * i + c] += (value - data[4 * i + c]) * a / 255;
    });
  });
}

// ---------------------------------------------------------------------------- the scene's controls
async function showScene(settings) {
  const drawing = new Drawing(settings);
  await drawing.load();
  const names = settings.words[language] ?? Object.values(settings.words)[0];
  const chosen = {kind: Object.keys(settings.held_out)[1], colour: "red", size: "big"};
  const box = element("details");
  const note = element("p", "quiet");
  note.setAttribute("role", "status");

  // A finger draws on the image itself, while the box is open.
  const frame = find("frame");
  box.ontoggle = () => {
    frame.style.touchAction = box.open ? "none" : "";
    if (box.open) use();
  };

  // While a thing moves, the drawing is shown. Then it becomes the page's image.
  function show() {
    drawing.draw();
    find("image").src = drawing.canvas.toDataURL();
  }

  function use() {
    show();
    const last = drawing.things.at(-1);
    const questions = last ? settings.questions[last.colour] : [];
    setImage(drawing.canvas.toDataURL(), questions);
    const never = drawing.things.filter(({kind, colour}) => settings.held_out[kind] === colour);
    const pairs = never.map(({kind, colour}) => `${names.colour[colour]} + ${names.kind[kind]}`);
    note.textContent = pairs.length ? `★ ${pairs.join(", ")}: ${sceneWords.never}` : "";
  }

  let moving = null;
  const point = ({clientX, clientY}) => {
    const {left, top, width} = frame.getBoundingClientRect(); // a square
    const scale = settings.side / width;
    return {x: (clientX - left) * scale, y: (clientY - top) * scale};
  };
  frame.onpointerdown = (event) => {
    if (!box.open) return;
    event.preventDefault();
    frame.setPointerCapture(event.pointerId);
    const at = point(event);
    moving = drawing.find(at) ?? drawing.add({...chosen, ...at});
    show();
  };
  frame.onpointermove = (event) => {
    if (!moving) return;
    Object.assign(moving, point(event));
    show();
  };
  frame.onpointerup = frame.onpointercancel = () => {
    if (!moving) return;
    drawing.settle(moving);
    moving = null;
    use();
  };

  // Without a finger.
  const half = settings.side / 2;
  const place = element("button", "", sceneWords.place);
  place.onclick = () => {
    drawing.add({...chosen, x: half, y: half});
    use();
  };
  place.onkeydown = (event) => {
    const ways = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
    const way = ways[event.key];
    const thing = drawing.things.at(-1);
    if (!way || !thing) return;
    event.preventDefault();
    thing.x += way[0] * settings.side / 3;
    thing.y += way[1] * settings.side / 3;
    drawing.settle(thing);
    use();
  };
  const clear = element("button", "", sceneWords.clear);
  clear.onclick = () => {
    drawing.things = [];
    use();
  };

  // A button for each kind, in the chosen colour, and for each colour.
  const kinds = element("p", "row");
  const colours = element("p", "row");
  function fill() {
    kinds.replaceChildren(...Object.keys(settings.held_out).map((kind) => {
      const icon = element("canvas");
      icon.width = icon.height = 64;
      const context = icon.getContext("2d");
      context.fillStyle = "#b9c7d8";
      context.fillRect(0, 0, 64, 64);
      drawing.draw_thing(context, {...chosen, kind, size: "small", x: 32, y: 32}, 64);
      return choice("kind", kind, icon);
    }));
    colours.replaceChildren(...Object.keys(names.colour).map((colour) => {
      const dot = element("canvas");
      dot.style.background = `rgb(${settings.colours[colour]})`;
      return choice("colour", colour, dot);
    }));
  }

  function choice(table, name, icon) {
    const button = element("button", "thumb");
    button.type = "button";
    icon.style.width = icon.style.height = "2.2rem";
    button.append(icon);
    button.title = names[table][name];
    button.setAttribute("aria-label", names[table][name]);
    button.setAttribute("aria-pressed", chosen[table] === name);
    if (chosen[table] === name) button.style.outline = "3px solid var(--accent)";
    button.onclick = () => {
      chosen[table] = name;
      fill();
      const row = table === "kind" ? kinds : colours;
      row.querySelector("[aria-pressed=true]").focus();
    };
    return button;
  }

  const menus = element("p", "row");
  menus.append(place, clear,
    menu(names.size, chosen.size, (name) => { chosen.size = name; }),
    menu(names.background, drawing.background, (name) => { drawing.background = name; use(); }));
  const how = element("p", "quiet", sceneWords.how);
  const parts = element("section");
  parts.append(how, kinds, colours, menus, note);
  box.append(element("summary", "", sceneWords.draw), parts);
  fill();
  find("extra").append(box);
}

function menu(table, value, onchange) {
  const select = element("select");
  for (const [name, text] of Object.entries(table)) {
    const option = element("option", "", text);
    option.value = name;
    select.append(option);
  }
  select.value = value;
  select.onchange = () => onchange(select.value);
  return select;
}

// ---------------------------------------------------------------------------- stage by stage
// The answer of the chosen stage to the last question, and where it looks.
function showSlider(stages) {
  const box = element("label", "quiet", sceneWords.slide);
  const slider = element("input");
  Object.assign(slider, {type: "range", min: 0, max: stages.length - 1, value: 0});
  slider.style.width = "100%";
  const output = element("output");
  output.style.display = "block";
  box.append(slider, output);
  find("extra").append(box);

  let earlier = null;
  slider.oninput = async () => {
    earlier?.abort();
    const now = earlier = new AbortController();
    const stage = stages[slider.value];
    const suggested = find("suggest").textContent && find("suggest").firstChild.textContent;
    const text = turns.at(-1)?.question || find("question").value.trim() || suggested;
    output.textContent = `${stage}: `;
    slider.setAttribute("aria-valuetext", stage);
    if (!text) return;
    let first = true;
    const onToken = ({text, attention, grid}) => {
      output.textContent += text;
      if (first && attention) glow(attention, grid, `${sceneWords.slide}: ${stage}`);
      first = false;
    };
    const messages = [{role: "user", text}];
    const options = {stage, messages, image, temperature: 0, maxTokens: 64, aside: true, onToken};
    try {
      await engine.answer({...options, signal: now.signal});
    } catch (error) {
      if (error.name !== "AbortError") output.textContent = `${words.error}: ${error.message}`;
    }
  };
}

async function startExtra() {
  const {scene, info: {stages}} = engine.settings;
  find("extra").hidden = !scene && stages.length < 2;
  if (scene) await showScene(scene);
  if (stages.length > 1) showSlider(stages);
}

startExtra();
