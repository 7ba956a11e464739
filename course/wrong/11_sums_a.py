import numpy as np


def sums_per_image(questions, *columns):
    # The file's name alone: images of two splits are taken for one.
    clusters = {}
    keys = [str(question.image or question.id) for question in questions]
    index = [clusters.setdefault(key, len(clusters)) for key in keys]
    columns = *columns, np.ones(len(index))
    return np.stack([np.bincount(index, column) for column in columns], axis=1)
