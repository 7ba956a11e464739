"""The demo: a small world of images, drawn and described in several languages, and the recipe that
trains a model on it. Pipeline: world -> words -> drawing, questions, text -> records -> write.

    world.py        scenes at random; things.json has the kinds of thing and the colours
    words/          the words: one file a language (python -m demo.words check FILE)
    check.py        what is wrong in the tables of words
    phrasing.py     patterns that stand for many wordings of a question
    drawing.py      a scene as an image, with atlas.py (silhouettes) and backgrounds.py
    questions.py    captions, questions and conversations about a scene
    records.py      LLaVA records for training and for the test splits
    text.py         text without images, translations and a dictionary
    write.py        all files of the world (python -m demo.write)
    recipe.py       the commands of the demo (python -m demo)
    steps.py        runs commands, and skips what is done
    ablation.py     the demo with one thing changed (python -m demo.ablation)
    findings.py     what its runs show together: transfer between languages, fertility
    expand.py       what a longer vocabulary is worth on published weights (python -m demo.expand)
"""
