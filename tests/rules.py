"""Texts, and the reading of them that rules are tested against: place by place, in plain Python."""

import numpy as np
from scipy.sparse import csc_array

from gemscope.features import Text, write_activations


def text_of(tokenizer, documents, *, context=64):
    """`{path: text}` as contexts of `context` tokens, all of them, BOS first."""
    ids, counts, lengths, owner, start = [], [], [], [], []
    bos = tokenizer.bos_token_id
    for number, content in enumerate(documents.values()):
        own = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
        for begin in range(0, len(own), context - 1):
            part = own[begin : begin + context - 1]
            ids += [bos, *part]
            counts += [False] + [True] * len(part)
            lengths.append(len(part) + 1)
            owner.append(number)
            start.append(begin)
    return Text(
        ids=np.array(ids, np.int32),
        counts=np.array(counts),
        offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        document=np.array(owner, np.int32),
        start=np.array(start, np.int32),
        paths=list(documents),
        sources=["text"],
        source=np.zeros(len(documents), np.int32),
    )


def activations_of(folder, text, columns, address="made/up"):
    """Activations of features given as arrays over all places."""
    return write_activations(folder, text, {address: csc_array(np.stack(columns, 1))})


def slowly(rule, text, tokenizer):
    """Where a rule of token, `token_1`, `text`, `position`, `repeats`, `pair` and `followed`
    conditions holds: each place by itself, from its context alone.
    """
    out = []
    for context in range(text.n_contexts):
        ids = text.ids[text.offsets[context] : text.offsets[context + 1]].tolist()
        for place in range(len(ids)):
            answers = _answers(ids[: place + 1], tokenizer)
            out.append(
                any(
                    all((answers[c.channel] in c.values) != c.negated for c in term)
                    for term in rule.terms
                )
            )
    return np.array(out)


def _answers(seen, tokenizer):
    """What may be said of the last of the tokens `seen`."""
    here, place = seen[-1], len(seen) - 1
    before = seen[:-1]
    pair = seen[-2:] if place else None
    pairs = [seen[i - 1 : i + 1] for i in range(1, place)]
    last = max((i for i, token in enumerate(before) if token == here), default=None)
    last_pair = max((i for i in range(1, place) if seen[i - 1 : i + 1] == pair), default=None)
    return {
        "token": here,
        "token_1": seen[-2] if place >= 1 else -1,
        "token_2": seen[-3] if place >= 2 else -1,
        "text": tokenizer.decode([here]).strip(),
        "position": _bin(place),
        "repeats": min(_bin(before.count(here)), 6),
        "pair": int(pair in pairs),
        "followed": seen[last + 1] if last is not None else -1,
        "followed_2": seen[last_pair + 1] if last_pair is not None else -1,
    }


def _bin(count):
    return count if count < 4 else 2 + count.bit_length() - 1
