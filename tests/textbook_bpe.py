"""Byte-pair encoding as the textbook has it: all pairs are counted anew for each merge.

It is what the tests compare tokenizer.py with, and what bench.py times it against.
"""


def count_pairs(ids):
    """Counts neighbours: [1, 2, 3, 1, 2] -> {(1, 2): 2, (2, 3): 1, (3, 1): 1}, first come first."""
    counts = {}
    for pair in zip(ids, ids[1:]):
        counts[pair] = counts.get(pair, 0) + 1
    return counts


def merge(ids, pair, new):
    """Replaces a pair by a new id: [1, 2, 3, 1, 2], pair (1, 2), new 4 -> [4, 3, 4]."""
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
    """Merges the most frequent pair again and again; of equals, the one that occurs first.

    Returns the merges {(int, int): int}, fewer if the pairs run out, and the ids of the bytes.
    """
    ids, merges = list(data), {}
    for new in range(256, vocab_size):
        counts = count_pairs(ids)
        if not counts:
            break
        pair = max(counts, key=counts.get)  # takes the first of equals
        ids = merge(ids, pair, new)
        merges[pair] = new
    return merges, ids


def textbook_bpe_encode(data, merges):
    """Merges, of the pairs present, the one that training merged first, until none is left."""
    ids = list(data)
    while len(ids) > 1:
        pair = min(count_pairs(ids), key=lambda pair: merges.get(pair, float("inf")))
        if pair not in merges:
            break
        ids = merge(ids, pair, merges[pair])
    return ids
