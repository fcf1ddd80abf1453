"""Other right answers: above each stands its question, and how it differs from the master's solution."""
# ruff: noqa: F811

import math

import numpy as np


# q1: plain Python
def average_bits(n, kept, k, gap):
    return kept / n * (gap + math.log2(k)) + k * 32 / n


# q2: by the middles between the values
def quantise(w, bits):
    values = np.linspace(w.min(), w.max(), 2**bits)
    return values[np.searchsorted((values[1:] + values[:-1]) / 2, w)]


# q2: in place
def quantise(w, bits):
    low, step = w.min(), np.ptp(w) / (2**bits - 1)
    w -= low
    w /= step
    np.rint(w, out=w)
    w *= step
    w += low
    return w


# q3: a list from two loops
def assign(w, f, codebook, bits, price):
    return [int(np.argmin([g * (v - c) ** 2 + 2 * price * b for c, b in zip(codebook, bits, strict=True)]))
            for v, g in zip(w, f, strict=True)]


# q4: the conditions of Lagrange as one system
def surgeon(w, H, q):
    n, unit = len(w), np.eye(len(w))[q]
    system = np.block([[H, unit[:, None]], [unit[None], np.zeros((1, 1))]])
    return w + np.linalg.solve(system, np.append(np.zeros(n), -w[q]))[:n]


# q5: pairs and single weights apart
def deletion_cost(v, F, r):
    products = F * np.outer(v, v)
    own = np.trace(products)
    return (r * own + r * r * (products.sum() - own)) / 2


# q6: sorted lists
def code_lengths(counts):
    groups, lengths = [(count, [number]) for number, count in enumerate(counts)], [0] * len(counts)
    while len(groups) > 1:
        (first, some), (second, others), *groups = sorted(groups, key=lambda group: group[0])
        for number in some + others:
            lengths[number] += 1
        groups.append((first + second, some + others))
    return lengths


# q6: an array of shares
def code_lengths(counts):
    shares, members = counts.astype(float) / counts.sum(), list(np.eye(counts.size))
    lengths = np.zeros(counts.size)
    while len(members) > 1:
        i, j = np.argsort(shares)[:2]
        joined = members[i] + members[j]
        lengths += joined
        members = [one for number, one in enumerate(members) if number not in (i, j)] + [joined]
        shares = np.append(np.delete(shares, [i, j]), shares[i] + shares[j])
    return lengths


# q7: bit by bit, to the layer where it buys most for its size
def allocate(sizes, ranges, traces, budget):
    bits = np.ones(len(sizes), int)
    while True:
        now, then = (ranges**2 * traces / (2.0**b - 1) ** 2 for b in (bits, bits + 1))
        fits = (bits < 8) & (sizes @ bits + sizes <= budget * sizes.sum())
        if not fits.any():
            return bits.tolist()
        bits[np.where(fits, (now - then) / sizes, -1).argmax()] += 1
