"""Byte-pair encoding as the textbook has it, to compare tokenizer.py with: all pairs counted for each merge."""


def count_pairs(ids):
    """[1, 2, 3, 1, 2] -> {(1, 2): 2, (2, 3): 1, (3, 1): 1}, in order of first occurrence."""
    counts = {}
    for pair in zip(ids, ids[1:]):
        counts[pair] = counts.get(pair, 0) + 1
    return counts


def merge(ids, pair, new):
    """[1, 2, 3, 1, 2], pair (1, 2), new 4 -> [4, 3, 4]"""
    left, right = pair
    merged, i = [], 0
    while i < len(ids):
        if ids[i] == left and i + 1 < len(ids) and ids[i + 1] == right:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def textbook_bpe_train(data, vocab_size):
    """merges {(int, int): int} of bytes, and the ids of those; fewer merges if the pairs run out.

    The most frequent pair is merged; `max` takes the first of equals, the one that occurs first.
    """
    ids, merges = list(data), {}
    for new in range(256, vocab_size):
        counts = count_pairs(ids)
        if not counts:
            break
        pair = max(counts, key=counts.get)
        ids = merge(ids, pair, new)
        merges[pair] = new
    return merges, ids


def textbook_bpe_encode(data, merges):
    """Ids of bytes: of the pairs present, the one that training merged first is merged, until none is left."""
    ids = list(data)
    while len(ids) > 1:
        pair = min(count_pairs(ids), key=lambda pair: merges.get(pair, float("inf")))
        if pair not in merges:
            break
        ids = merge(ids, pair, merges[pair])
    return ids
