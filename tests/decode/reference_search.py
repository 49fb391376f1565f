"""Naive references: greedy, and beam search as lists of hypotheses, one prompt at a time."""

import itertools

import numpy as np
from toy_model import log_softmax


def process(scores, prefix, *, penalty=1.0, ngram=0, min_length=0, eos=1, suppressed=()):
    """Hugging Face's processors on one row; the start token 0 is part of the history."""
    scores = np.array(scores, np.float64)
    history = [0, *prefix]
    if penalty != 1:
        for token in set(history):
            scores[token] *= penalty if scores[token] < 0 else 1 / penalty
    if ngram:
        seen = {}
        for start in range(len(history) - ngram + 1):
            *key, last = history[start : start + ngram]
            seen.setdefault(tuple(key), []).append(last)
        if len(history) >= ngram:
            scores[seen.get(tuple(history[len(history) - ngram + 1 :]), [])] = -np.inf
    if len(prefix) < min_length:
        scores[eos] = -np.inf
    scores[list(suppressed)] = -np.inf
    return scores


def greedy_search(model, steps, *, eos=1, **processors):
    """Tokens and the log-probability of each."""
    tokens, log_probs = [], []
    while len(tokens) < steps and (not tokens or tokens[-1] != eos):
        scores = log_softmax(process(model.logits(tokens), tokens, eos=eos, **processors))
        tokens.append(int(scores.argmax()))
        log_probs.append(scores.max())
    return tokens, log_probs


def beam_search(model, steps, beams, *, length_penalty, early_stopping, eos=1, **processors):
    """The pool of finished hypotheses, (score, tokens), best first."""
    running, pool = [(0.0, [])], []
    for step in range(steps):
        candidates = []
        for score, tokens in running:
            row = process(model.log_probs(tokens), tokens, eos=eos, **processors)
            candidates += [(score + row[token], [*tokens, token]) for token in range(len(row))]
        candidates.sort(key=lambda item: -item[0])
        candidates = candidates[: 2 * beams]

        def ended(tokens, step=step):
            return tokens[-1] == eos or step + 1 == steps

        was_full = len(pool) == beams
        for score, tokens in candidates[:beams]:
            if ended(tokens) and not (early_stopping and was_full):
                pool.append((score / len(tokens) ** length_penalty, tokens))
        pool = sorted(pool, key=lambda item: -item[0])[:beams]
        running = [item for item in candidates if not ended(item[1])][:beams]
        if len(pool) == beams and running:
            best = running[0][0] / (step + 1) ** length_penalty
            if early_stopping or best <= pool[-1][0]:
                break
    return pool


def exhaustive_best(model, steps, vocab_size, *, length_penalty, eos=1):
    """The best of all outputs there are: (score, tokens)."""
    best = (-np.inf, [])
    others = [token for token in range(vocab_size) if token != eos]
    for length in range(1, steps + 1):
        for body in itertools.product(others, repeat=length - 1):
            for last in range(vocab_size) if length == steps else [eos]:
                tokens = [*body, last]
                total = sum(model.log_probs(tokens[:i])[t] for i, t in enumerate(tokens))
                best = max(best, (total / length**length_penalty, tokens))
    return best
