"""Builds a visual instruction set in several languages from any images, with a GPT-4V-class model.

This is X-LLaVA's data construction (arXiv 2403.11399, section 3.2): questions and answers of four
kinds (object-, location-, atmosphere-centric, conversation), the same ones in every language.

    __main__.py      the commands: python -m annotation IMAGES …, python -m annotation stats …
    prompts.py       the requests; prompts.json: what the model is asked, word for word
    images.py        which images are in a folder
    build.py         the run: ask for what the journal lacks, then make the set from it
    filters.py       which pairs may be taught, and why the others may not
    languages.json   names of languages; how a model says there that it can't see
    stats.py         counts of a set, and a page of random samples (sheet.html)

The server is asked by evaluation/client.py. Nothing imports this folder.
"""
