"""A page to ask a model on, and an endpoint that other programs can call.

    python -m chat out/demo/instruct

answers.py         stages of a run, messages to turns, answers token by token with their attention
server.py          the HTTP server: OpenAI's endpoint, the page, and who may ask
page.html, page.css, page.js    the page; it asks a global `engine`, whose methods page.js lists
server_engine.js   the `engine` of a served page: it asks the endpoint
"""
