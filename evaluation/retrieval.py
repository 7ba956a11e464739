"""Finding the image of a caption, the caption of an image, and a caption in another language.

    python -m evaluation retrieve --model out/demo/instruct --data captions.json

Images with a caption in every language are cut into pools of K. In a pool all candidates are ranked
by likelihood. R@1, R@5: the right one is among the first 1, 5. MRR: the mean of 1 / rank.
"""

from collections import Counter, defaultdict

import numpy as np

import data
from evaluation.batching import add_model_arguments
from evaluation.likelihood import log_likelihoods, make_batcher
from evaluation.metrics import bootstrap
from evaluation.questions import check_images, read_file
from evaluation.tables import MEASURES, MODELS, show_results
from generate import load_for_inference, question_parts
from vocabulary import flags
from vocabulary.chat_markers import encode_answer
from vocabulary.conversations import leave_out


def rank_scores(scores, right):
    """{"R@1", "R@5", "MRR"} of the right candidate. scores (K,): of all. Ties are broken at random,
    on average."""
    first = int((scores > scores[right]).sum()) + 1
    tied = int((scores == scores[right]).sum())
    ranks = range(first, first + tied)  # those that the right one may have
    gains = [(rank <= 1, rank <= 5, 1 / rank) for rank in ranks]
    return {name: sum(column) / tied for name, column in zip(MEASURES, zip(*gains))}


def retrieve(likelihood, blind):
    """{(direction, model): [rank_scores of each query]} of one pool.

    likelihood[language] (K, K): log P(caption j | image i). blind[language] (K,): log P(caption j).
    """
    scores = {}  # direction -> (K, K) of the model and without images: queries, candidates
    for language, joint in likelihood.items():
        # The likelihood itself ("raw") prefers short and common captions. So captions are ranked
        # by how much more likely the image makes them. Among images the caption is the same.
        prior, equal = np.broadcast_to(blind[language], joint.shape), np.zeros_like(joint)
        scores[f"image → {language}"] = joint - prior, equal
        scores[f"image → {language}, raw"] = joint, prior
        scores[f"{language} → image"] = joint.T, equal
        for other in likelihood.keys() - {language}:
            gain = likelihood[other] - blind[other]
            scores[f"{language} → {other}"] = score_translations(joint, gain), equal

    found = {}
    for direction, (full, prior) in scores.items():
        for model, matrix in zip(MODELS, (full, prior, np.zeros_like(prior))):
            found[direction, model] = [rank_scores(row, i) for i, row in enumerate(matrix)]
    return found


def score_translations(joint, gain):
    """For each caption the scores of the other language's captions, through the pool's images:
    log Σ_i P(image i | caption) · P(other | image i) / P(other).

    joint (images, captions): log P(caption | image). gain (images, others): log of the quotient."""
    # P(image | caption): the softmax over the images
    with np.errstate(divide="ignore"):
        weights = np.log(np.exp(joint - np.logaddexp.reduce(joint, axis=0)))
    return [np.logaddexp.reduce(weights[:, i, None] + gain, axis=0) for i in range(len(joint))]


def read_captions(paths, images=None, seed=0, bad_samples="error"):
    """({image: {language: caption}}, {language: question}): images with captions of their own in
    all languages, in random order."""
    captions, prompts = defaultdict(dict), defaultdict(Counter)
    bad, image_faults = [], {}
    for path in paths:
        for q in read_file(path, images, bad=bad):
            if q.turn == 0 and isinstance(q.truth, str) and len(q.image_paths) == 1:
                try:
                    check_images(q, image_faults)
                except ValueError as error:
                    bad.append(f"{q.where}: {error}")
                    continue
                captions[q.image_paths[0]].setdefault(q.language, q.truth)
                prompts[q.language][q.question] += 1

    leave_out(bad, bad_samples)

    # No caption occurs twice: it would be right for two images.
    images = [image for image in sorted(captions) if len(captions[image]) == len(prompts)]
    np.random.default_rng(seed).shuffle(images)
    chosen, used = {}, set()
    for image in images:
        if used.isdisjoint(captions[image].values()):
            chosen[image] = captions[image]
            used.update(captions[image].values())
    questions = {language: prompts[language].most_common(1)[0][0] for language in sorted(prompts)}
    return chosen, questions


def pool_samples(captions, questions, pool_size, tokenizer, num_patches):
    """Samples for log_likelihoods: for each image, in each language, the image with each of its
    pool's captions, then its own caption without an image."""
    images, samples = list(captions), []
    for number, image in enumerate(images):
        first = number // pool_size * pool_size
        for language, text in questions.items():
            turns = [(question_parts(text, 1), None)]
            prompt, _ = data.encode_chat(turns, tokenizer, num_patches)
            blind_prompt, _ = data.encode_chat([(text, None)], tokenizer, num_patches)
            texts = [captions[name][language] for name in images[first : first + pool_size]]
            answers = [encode_answer(caption, tokenizer) for caption in texts]
            samples += [(prompt, [image], answer) for answer in answers]
            samples.append((blind_prompt, [], answers[number - first]))
    return samples


def retrieval_rows(found, pool_size):
    """Rows {"direction", "model", "n", "pool", and each measure with its interval}."""
    rows = []
    for direction, model in sorted(found, key=lambda key: (key[0], MODELS.index(key[1]))):
        scores = found[direction, model]
        row = {"direction": direction, "model": model, "n": len(scores), "pool": pool_size}
        for measure in MEASURES:
            values = [score[measure] for score in scores]
            row[measure] = bootstrap(np.stack([values, np.ones(len(values))], axis=1))
            if model == "chance":
                row[measure] = (values[0],) * 3  # known exactly
        rows.append(row)
    return rows


def add_arguments(parser):
    add_model_arguments(parser)
    add = parser.add_argument
    add("--max-images", type=flags.count, default=200, metavar="N", help="queries at most")
    about = "candidates per query"
    add("--pool", type=flags.at_least(2, most=1000), default=20, metavar="K", help=about)
    add("--seed", type=flags.seed, default=0, help="which images share a pool")


def run(args):
    # The data first: loading a large model takes minutes.
    captions, questions = read_captions(args.data, args.images, args.seed, args.bad_samples)
    K, languages = args.pool, list(questions)
    num_pools = min(args.max_images, len(captions)) // K
    if not num_pools:
        found = f"{len(captions)} images have captions of their own in {', '.join(languages)}"
        raise ValueError(f"{found}; a pool takes {K}")
    captions = {image: captions[image] for image in list(captions)[: num_pools * K]}
    model, tokenizer = load_for_inference(args.model, args.device)
    samples = pool_samples(captions, questions, K, tokenizer, model.config.vision.num_patches)
    for prompt, names, answer in samples:
        try:
            data.check_length(prompt + answer, model.config)
        except ValueError as error:
            raise ValueError(f"a caption of the pool of {names[0]}: {error}") from None

    # In the order of pool_samples: (pools, images, languages, captions and one without an image)
    values = log_likelihoods(model, samples, make_batcher(model, samples, args))
    values = values.reshape(num_pools, K, len(languages), K + 1)
    found = defaultdict(list)
    for pool in values:
        likelihood = {language: pool[:, i, :K] for i, language in enumerate(languages)}
        blind = {language: pool[:, i, K] for i, language in enumerate(languages)}
        for key, scores in retrieve(likelihood, blind).items():
            found[key] += scores

    show_results({"model": args.model, "retrieval": retrieval_rows(found, K)}, args.out)
    print(f"{len(captions)} queries in {num_pools} pools of {K}; in brackets 95% intervals")
