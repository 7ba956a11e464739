"""How well a model answers, in each language, and how sure the numbers are.

python -m evaluation COMMAND --help
COMMAND: answer, likelihood, retrieve, compare, judge, probe, heatmap or report

questions.py    reads questions: LLaVA records, POPE, GQA and xGQA, VQAv2
answer.py       the model's answers, kept in a file, and their accuracy
likelihood.py   perplexity and bits per byte of references and of plain text
retrieval.py    images from captions, captions from images and from other languages
compare.py      runs compared on the same questions
judge.py        preferences and grades by another model
probe.py        what a linear model finds in the patches of a vision encoder
heatmap.py      where a word is on an image
report/         all of it on one HTML page
metrics.py      scores of single answers; intervals and tests
scores.py       scores by split, language and kind
tables.py       the same tables as text and as HTML
batching.py     prompts in batches on a device
client.py       the HTTP client of judge and of annotation/
journal.py      what a server was asked and replied, on disk before it is read
"""
