"""A page to ask a model on, and an endpoint for programs: docs/chat.md.

requests.py        what OpenAI's fields ask of the model
answers.py         stages of a run; answers token by token, with probability and attention
server.py          HTTP: who may ask, and what is sent
page.html, page.css, page.js    the page; it asks a global `engine`, whose methods page.js lists
server_engine.js   the `engine` that asks the server
export.py          the page in one file, with the model in it
model.js           tokenizer, vision encoder, decoder and generation in JavaScript
local_engine.js    the `engine` that runs model.js in a worker
scene.js           in that page: scenes to draw, and a slider over the stages
"""
