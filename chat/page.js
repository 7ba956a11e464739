// The page: image, question, answer. It never talks to a server: it asks a global `engine`, either
// server_engine.js or, in an exported page, local_engine.js. The methods, all async:
//
//   info() -> {stages: [name], stage, fit: "contain" | "cover" | "fill",
//       layers, heads (0: can't be chosen), images: [{name, url, questions?: [text]}]}
//   answer({stage, messages: [{role, text}], image, blind, temperature, maxTokens, signal, onToken})
//       -> {text, finish: "stop" | "length"}. image: a data URL or null. onToken gets, per token,
//       {text, piece, probability, alternatives: [{text, probability}], attention: [per patch]
//       or null, grid: [rows, columns]}. text is "" where a token completes no character.
//   attention({stage, token, layer, head}) -> [per patch] of the last answer that had an image.
//       token: its index in the answer; layer, head: an index, or null for the mean.
//   pieces({text}) -> [{tokenizer: "base" | "expanded", pieces: [text]}]
//   heat({stage, word, image}) -> {grid, scores: [per patch, 0 … 1]}
//
// What a model or a person writes only ever becomes text: textContent, never HTML.
"use strict";

const WORDS = {
  en: {
    stage: "After stage", image: "Image", drop: "Drop, paste or choose an image",
    choose: "Choose an image", remove: "Remove", examples: "Examples",
    word: "A word, in any language", light: "Show where", layer: "Layer", head: "Head",
    mean: "mean", talk: "Conversation", question: "Ask in any language", ask: "Ask",
    stop: "Stop", new: "New", blind: "also without the image", pieces: "The question in pieces",
    suggest: "Questions to try", every: "every stage, one by one", seen: "With the image",
    unseen: "Blind: without the image", base: "base tokenizer", expanded: "expanded tokenizer",
    stopped: "stopped", length: "cut off: the limit of tokens", empty: "(no words)",
    hint: "Point at a token, or walk with the arrow keys, to see where it looks.",
    onImage: "{} of its attention is on the image", fits: "where it fits best", error: "Error",
    tokens: "tokens", next: "next:",
  },
  ko: {
    stage: "학습 단계", image: "이미지", drop: "이미지를 놓거나 붙여 넣거나 고르세요",
    choose: "이미지 고르기", remove: "지우기", examples: "예시",
    word: "단어 (어느 언어든)", light: "위치 보기", layer: "층", head: "헤드",
    mean: "평균", talk: "대화", question: "어느 언어로든 물어보세요", ask: "묻기",
    stop: "멈춤", new: "새 대화", blind: "이미지 없이도", pieces: "질문의 조각",
    suggest: "질문 예시", every: "모든 단계, 차례로", seen: "이미지를 보고",
    unseen: "이미지 없이", base: "기본 토크나이저", expanded: "확장 토크나이저",
    stopped: "멈춤", length: "토큰 한도에서 끊김", empty: "(말 없음)",
    hint: "토큰을 가리키거나 화살표 키로 옮기면 어디를 보는지 나옵니다.",
    onImage: "어텐션의 {}가 이미지에 있음", fits: "가장 잘 맞는 곳", error: "오류",
    tokens: "토큰", next: "다음 후보:",
  },
  zh: {
    stage: "训练阶段", image: "图像", drop: "拖入、粘贴或选择一张图像",
    choose: "选择图像", remove: "移除", examples: "示例",
    word: "一个词，任何语言", light: "显示位置", layer: "层", head: "头",
    mean: "平均", talk: "对话", question: "用任何语言提问", ask: "提问",
    stop: "停止", new: "新对话", blind: "同时不看图像回答", pieces: "问题的分词",
    suggest: "可以试的问题", every: "所有阶段，逐个回答", seen: "看图像",
    unseen: "不看图像", base: "基础分词器", expanded: "扩展分词器",
    stopped: "已停止", length: "达到词元上限", empty: "（没有文字）",
    hint: "指向一个词元，或用方向键移动，即可看到它关注的位置。",
    onImage: "{} 的注意力在图像上", fits: "最匹配的位置", error: "错误",
    tokens: "个词元", next: "其次：",
  },
};
const language = (navigator.languages || ["en"]).map((code) => code.slice(0, 2).toLowerCase())
  .find((code) => code in WORDS) || "en";
const words = WORDS[language];
const find = (id) => document.getElementById(id);

let info = null;
let image = null; // a data URL
let turns = []; // {question, seen, blind}: the two answers, null where there is none
let running = null; // the AbortController of the answer that streams
let chosen = null; // {token, index, isLast}: the token whose attention is shown

// ---------------------------------------------------------------------------- small tools
function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function say(text) {
  find("status").textContent = text;
}

function percent(share) {
  const value = 100 * share;
  return (value >= 10 || value === 0 ? value.toFixed(0) : value.toPrecision(2)) + "%";
}

function translate() {
  document.documentElement.lang = language;
  for (const each of document.querySelectorAll("[data-word]")) {
    each.textContent = words[each.dataset.word];
  }
  for (const each of document.querySelectorAll("[data-label]")) {
    each.setAttribute("aria-label", words[each.dataset.label]);
  }
  for (const each of document.querySelectorAll("[data-hint]")) {
    each.placeholder = words[each.dataset.hint];
  }
}

// ---------------------------------------------------------------------------- the image
function setImage(url, questions = []) {
  newConversation();
  image = url;
  find("image").hidden = find("remove").hidden = !url;
  find("drop").hidden = Boolean(url);
  if (url) find("image").src = url;
  else find("image").removeAttribute("src");
  find("image").alt = url ? words.image : "";
  find("suggest").replaceChildren(...questions.map((text) => {
    const button = element("button", "quiet", text);
    button.type = "button";
    button.dir = "auto";
    button.onclick = () => ask(text);
    return button;
  }));
}

function readFile(file) {
  if (!file) return;
  const reader = new FileReader();
  reader.onload = () => setImage(reader.result);
  reader.readAsDataURL(file);
}

// Each patch as a square: orange where the weight is large, veiled where it is small.
function glow(weights, grid, text = "") {
  const canvas = find("glow");
  const context = canvas.getContext("2d");
  find("legend").textContent = text;
  canvas.width = canvas.height = 480;
  if (!weights || !image) return;
  const [rows, columns] = grid;
  const veil = matchMedia("(prefers-color-scheme: dark)").matches ? "11, 17, 32" : "255, 255, 255";
  const least = Math.min(...weights);
  const range = Math.max(Math.max(...weights) - least, 1e-9);
  weights.forEach((weight, i) => {
    const strength = (weight - least) / range;
    const x = Math.round((i % columns) * 480 / columns);
    const y = Math.round(Math.floor(i / columns) * 480 / rows);
    const side = [Math.ceil(480 / columns), Math.ceil(480 / rows)];
    context.fillStyle = `rgba(${veil}, ${0.8 * (1 - strength)})`;
    context.fillRect(x, y, ...side);
    context.fillStyle = `rgba(255, 80, 0, ${0.45 * strength})`;
    context.fillRect(x, y, ...side);
  });
}

// ---------------------------------------------------------------------------- tokens
async function showToken(token, index, isLast, box) {
  chosen = {token, index, isLast, box};
  for (const each of document.querySelectorAll(".token.on")) each.classList.remove("on");
  box.tokens[index].classList.add("on");
  box.detail.replaceChildren(...tokenDetail(token));
  if (!token.attention) return glow(null);

  let weights = token.attention;
  const [layer, head] = ["layer", "head"].map((id) => find(id).value);
  if (isLast() && (layer || head)) {
    const number = (text) => (text ? Number(text) : null);
    const stage = box.stage;
    weights = await engine.attention({stage, token: index, layer: number(layer), head: number(head)});
  }
  if (!weights || chosen.token !== token) return;
  const share = percent(weights.reduce((sum, weight) => sum + weight, 0));
  glow(weights, token.grid, `${token.piece ?? token.text}: ${words.onImage.replace("{}", share)}`);
}

// The token and the next most probable, each with a bar.
function tokenDetail(token) {
  const all = [{text: token.piece ?? token.text, probability: token.probability}];
  return [...all, ...(token.alternatives || [])].map((each, i) => {
    const row = element("span", i ? "chance" : "chance first");
    const name = element("bdi", "", each.text);
    const bar = element("span", "bar");
    bar.style.width = `${Math.max(2, 60 * each.probability)}px`;
    row.append(name, " ", percent(each.probability), bar);
    return row;
  });
}

// An answer that fills up token by token. Arrow keys walk over its tokens.
function answerBox(stage, label) {
  const box = {stage, node: element("div", "answer"), list: [], tokens: []};
  box.text = element("p", "text");
  box.text.dir = "auto";
  box.note = element("p", "note");
  box.detail = element("p", "detail");
  box.node.append(element("p", "label", label), box.text, box.detail, box.note);
  box.text.onkeydown = (event) => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    const at = box.tokens.indexOf(document.activeElement) + step;
    if (!step || !box.tokens[at]) return;
    event.preventDefault();
    box.tokens[at].focus();
  };
  return box;
}

function addToken(box, token, isLast) {
  const index = box.list.push(token) - 1;
  const span = element("span", token.text ? "token" : "token part", token.text);
  span.tabIndex = index ? -1 : 0;
  span.style.setProperty("--doubt", 1 - token.probability);
  const show = () => showToken(token, index, isLast, box);
  span.onpointerenter = span.onfocus = span.onclick = show;
  box.tokens.push(span);
  box.text.append(span);
}

// ---------------------------------------------------------------------------- questions
// A blind conversation has only blind answers: the others would give away the image.
function history(blind, question) {
  const answer = (turn) => (blind ? turn.blind : turn.seen);
  const past = turns.filter((turn) => answer(turn) !== null);
  const messages = past.flatMap((turn) => [
    {role: "user", text: turn.question}, {role: "assistant", text: answer(turn)}]);
  return [...messages, {role: "user", text: question}];
}

async function stream(box, blind, question) {
  const messages = history(blind, question);
  const isLast = () => !blind && box === stream.last;
  if (!blind) stream.last = box;
  const onToken = (token) => addToken(box, token, isLast);
  const options = {stage: box.stage, messages, image, blind, temperature: 0, maxTokens: 128};
  box.node.classList.add("busy");
  try {
    const {text, finish} = await engine.answer({...options, signal: running.signal, onToken});
    if (finish === "length") box.note.textContent = words.length;
    if (!text) box.note.textContent = words.empty;
    // The end may hold what no token has completed.
    const shown = box.list.map((token) => token.text).join("");
    box.text.append(text.slice(shown.length));
    return text;
  } catch (error) {
    const stopped = error.name === "AbortError";
    box.note.textContent = stopped ? words.stopped : `${words.error}: ${error.message}`;
    box.node.classList.toggle("failed", !stopped);
    if (!stopped) throw error;
    return box.list.map((token) => token.text).join("");
  } finally {
    box.node.classList.remove("busy");
  }
}

async function ask(question) {
  question = question.trim();
  if (!question || running) return;
  running = new AbortController();
  find("stop").disabled = false;
  find("send").disabled = true;
  find("question").value = "";
  find("suggest").hidden = true;
  showPieces(question);

  const turn = element("article", "turn");
  const asked = element("p", "question", question);
  asked.dir = "auto";
  turn.append(asked);
  find("log").append(turn);
  try {
    await answerAll(turn, question);
  } catch (error) {
    say(`${words.error}: ${error.message}`);
  }
  running = null;
  find("stop").disabled = true;
  find("send").disabled = false;
}

// The chosen stage, or one after the other; beside each answer the blind one.
async function answerAll(turn, question) {
  const stage = find("stage").value;
  const done = {question, seen: "", blind: null};
  for (const name of stage ? [stage] : info.stages) {
    if (running.signal.aborted) break;
    const pair = element("div", "pair");
    const seen = answerBox(name, image ? `${words.seen} · ${name}` : name);
    pair.append(seen.node);
    turn.append(pair);
    turn.scrollIntoView({block: "nearest"});
    done.seen = await stream(seen, false, question);
    say(done.seen || words.empty);

    if (image && find("blind").checked && !running.signal.aborted) {
      const blind = answerBox(name, words.unseen);
      blind.node.classList.add("blind");
      pair.append(blind.node);
      done.blind = await stream(blind, true, question);
    }
    turn.scrollIntoView({block: "nearest"});
  }
  turns.push(done);
  if (image && !chosen) find("legend").textContent = words.hint;
}

function newConversation() {
  running?.abort();
  turns = [];
  chosen = null;
  find("log").replaceChildren();
  find("pieces").replaceChildren();
  find("suggest").hidden = false;
  glow(null);
}

async function showPieces(text) {
  let cuts = [];
  try {
    cuts = await engine.pieces({text});
  } catch (error) {
    return; // the answer says what is wrong
  }
  find("pieces").replaceChildren(...cuts.map(({tokenizer, pieces}) => {
    const row = element("p", "pieces");
    row.append(element("span", "label", `${words[tokenizer]}: ${pieces.length} ${words.tokens}`));
    pieces.forEach((piece, i) => row.append(element("bdi", `piece tint${i % 5}`, piece)));
    return row;
  }));
}

async function showHeat(event) {
  event.preventDefault();
  const word = find("word").value.trim();
  const stage = find("stage").value || info.stage;
  if (!word || !image) return;
  try {
    const {grid, scores} = await engine.heat({stage, word, image});
    glow(scores, grid, `${word}: ${words.fits}`);
    say(find("legend").textContent);
  } catch (error) {
    find("legend").textContent = `${words.error}: ${error.message}`;
  }
}

// ---------------------------------------------------------------------------- start
function fillSelect(id, names, first) {
  const options = [first, ...names].filter(Boolean).map(([value, text]) => {
    const option = element("option", "", text);
    option.value = value;
    return option;
  });
  find(id).replaceChildren(...options);
}

function connect() {
  find("ask").onsubmit = (event) => {
    event.preventDefault();
    ask(find("question").value);
  };
  find("question").onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask(find("question").value);
  };
  find("stop").onclick = () => running?.abort();
  find("new").onclick = newConversation;
  find("remove").onclick = () => setImage(null);
  find("file").onchange = (event) => {
    readFile(event.target.files[0]);
    event.target.value = "";
  };
  find("heat").onsubmit = showHeat;
  find("layer").onchange = find("head").onchange = () => {
    if (chosen) showToken(chosen.token, chosen.index, chosen.isLast, chosen.box);
  };
  document.ondragover = (event) => event.preventDefault();
  document.ondrop = (event) => {
    event.preventDefault();
    readFile(event.dataTransfer.files[0]);
  };
  document.onpaste = (event) => readFile(event.clipboardData.files[0]);
}

async function start() {
  translate();
  connect();
  try {
    info = await engine.info();
  } catch (error) {
    find("log").textContent = `${words.error}: ${error.message}`;
    return;
  }
  const every = info.stages.length > 1 ? ["", words.every] : null;
  fillSelect("stage", [...info.stages.map((name) => [name, name]), every].filter(Boolean));
  find("stage").value = info.stage;
  const numbers = (count) => Array.from({length: count}, (_, i) => [String(i), String(i + 1)]);
  fillSelect("layer", numbers(info.layers), ["", words.mean]);
  fillSelect("head", numbers(info.heads), ["", words.mean]);
  find("heads").hidden = !info.layers;
  find("image").style.objectFit = info.fit;
  find("thumbs").append(...info.images.map(({url, questions}, i) => {
    const button = element("button", "thumb");
    const small = element("img");
    [button.type, small.src, small.alt] = ["button", url, `${words.image} ${i + 1}`];
    button.append(small);
    button.onclick = () => setImage(url, questions);
    return button;
  }));
}

start();
