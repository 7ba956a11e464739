// The `engine` of a served page (page.js lists the methods): it asks the endpoint of server.py.
// A secret, if the server wants one, stands behind the # of the page's address.
"use strict";

const engine = (() => {
  const token = location.hash.slice(1);
  let maps = []; // of the last answer that had an image: per token [layer][head][patch]

  async function fetchOk(path, body, signal) {
    const headers = token ? {Authorization: `Bearer ${token}`} : {};
    const options = {headers, signal};
    if (body) {
      headers["Content-Type"] = "application/json";
      Object.assign(options, {method: "POST", body: JSON.stringify(body)});
    }
    const response = await fetch(path, options);
    if (response.ok) return response;
    const found = await response.json().catch(() => null);
    throw new Error(found?.error?.message ?? `HTTP ${response.status}`);
  }

  const json = async (path, body) => (await fetchOk(path, body)).json();

  // The image goes with the first question.
  function content(text, image) {
    return image ? [{type: "image_url", image_url: {url: image}}, {type: "text", text}] : text;
  }

  async function answer({stage, messages, image, blind, temperature, maxTokens, signal, onToken}) {
    const shown = blind ? null : image;
    const body = {
      model: stage, temperature, max_tokens: maxTokens, stream: true, details: true,
      messages: messages.map(({role, text}, i) => ({role, content: content(text, i ? null : shown)})),
    };
    const response = await fetchOk("v1/chat/completions", body, signal);
    if (shown) maps = [];

    // Server-sent events: "data: {…}", each followed by an empty line.
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let [rest, text, finish] = ["", "", null];
    for (;;) {
      const {done, value} = await reader.read();
      if (done && !finish) throw new Error("the server ended the answer");
      if (done) return {text, finish};
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events.filter((each) => each !== "data: [DONE]")) {
        const chunk = JSON.parse(event.slice(6));
        if (chunk.error) throw new Error(chunk.error.message);
        const [{delta, finish_reason}] = chunk.choices;
        text += delta.content ?? "";
        finish = finish_reason ?? finish;
        if (chunk.token) {
          if (shown) maps.push(chunk.token.maps);
          onToken({text: delta.content, ...chunk.token});
        }
      }
    }
  }

  // The mean over the layers and heads that are not chosen.
  async function attention({token, layer, head}) {
    const chosen = (list, i) => (i === null ? list : [list[i]]);
    const rows = chosen(maps[token] ?? [], layer).flatMap((heads) => chosen(heads, head));
    if (!rows.length) return null;
    return rows[0].map((_, i) => rows.reduce((sum, row) => sum + row[i], 0) / rows.length);
  }

  return {
    info: () => json("x/info"),
    answer,
    attention,
    pieces: ({text}) => json("x/pieces", {text}),
    heat: ({stage, word, image}) => json("x/heat", {model: stage, word, image}),
  };
})();
