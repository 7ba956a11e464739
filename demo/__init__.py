"""The demo: a small world of images, drawn and described in several languages, and the recipe that
trains a model on it.

    world.py        kinds, colours, sizes, places, backgrounds; random scenes
    words/          the words: one file a language
    check.py        checks the words against the world and against each other
    atlas.py        the silhouettes of the kinds
    backgrounds.py  the backgrounds, one function each
    drawing.py      a scene as an image
    questions.py    captions, questions and conversations about a scene
    records.py      LLaVA records for training and for the test splits
    text.py         text without images, translations and a dictionary
    write.py        all files of the world (python -m demo.write)
    steps.py        runs a list of commands, and skips what is done
    recipe.py       the commands of the demo (python -m demo)
    ablation.py     the demo with one thing changed (python -m demo.ablation)
"""
