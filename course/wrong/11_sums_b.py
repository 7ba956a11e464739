import numpy as np


def sums_per_image(questions, *columns):
    # All questions without an image are taken for one.
    clusters = {}
    keys = [(question.split, str(question.image)) for question in questions]
    index = [clusters.setdefault(key, len(clusters)) for key in keys]
    columns = *columns, np.ones(len(index))
    return np.stack([np.bincount(index, column) for column in columns], axis=1)
