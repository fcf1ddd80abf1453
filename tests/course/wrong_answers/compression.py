"""Typical wrong answers: above each stands its question and what the check has to say (a regular expression)."""
# ruff: noqa: F811

import numpy as np


# q1: codebook is missing
def average_bits(n, kept, k, gap):
    return kept * (np.log2(k) + gap) / n


# q1: average over the kept weights
def average_bits(n, kept, k, gap):
    return (kept * (np.log2(k) + gap) + 32 * k) / kept


# q1: only the weights that are kept
def average_bits(n, kept, k, gap):
    return (n * (np.log2(k) + gap) + 32 * k) / n


# q1: distances are missing
def average_bits(n, kept, k, gap):
    return (kept * np.log2(k) + 32 * k) / n


# q1: natural logarithm
def average_bits(n, kept, k, gap):
    return (kept * (np.log(k) + gap) + 32 * k) / n


# q2: there are 7 steps, not 8
def quantise(w, bits):
    low, step = w.min(), (w.max() - w.min()) / 2**bits
    return low + np.round((w - low) / step) * step


# q2: this rounds down
def quantise(w, bits):
    low, step = w.min(), (w.max() - w.min()) / (2**bits - 1)
    return low + np.floor((w - low) / step + 1e-9) * step


# q2: these are 3
def quantise(w, bits):
    low, step = w.min(), (w.max() - w.min()) / (bits - 1)
    return low + np.round((w - low) / step) * step


# q3: these are the nearest values
def assign(w, f, codebook, bits, price):
    return np.abs(w[:, None] - codebook).argmin(1)


# q3: the Fisher information is missing
def assign(w, f, codebook, bits, price):
    return (0.5 * (w[:, None] - codebook) ** 2 + price * bits).argmin(1)


# q3: the half in front of the Fisher information
def assign(w, f, codebook, bits, price):
    return (f[:, None] * (w[:, None] - codebook) ** 2 + price * bits).argmin(1)


# q3: the price of a bit is missing
def assign(w, f, codebook, bits, price):
    return (0.5 * f[:, None] * (w[:, None] - codebook) ** 2 + bits).argmin(1)


# q3: their numbers were asked for
def assign(w, f, codebook, bits, price):
    return codebook[(0.5 * f[:, None] * (w[:, None] - codebook) ** 2 + price * bits).argmin(1)]


# q4: the others have not moved
def surgeon(w, H, q):
    w[q] = 0
    return w


# q4: not of H
def surgeon(w, H, q):
    return w - w[q] / H[q, q] * H[:, q]


# q4: it has doubled
def surgeon(w, H, q):
    c = np.linalg.inv(H)[:, q]
    return w + w[q] / c[q] * c


# q5: printed formula
def deletion_cost(v, F, r):
    return r / 2 * np.sum(np.diag(F) * v**2)


# q5: probability r\^2, not r
def deletion_cost(v, F, r):
    return r / 2 * v @ F @ v


# q5: probability r, not r\^2
def deletion_cost(v, F, r):
    return r**2 / 2 * v @ F @ v


# q5: covariance part alone
def deletion_cost(v, F, r):
    return r * (1 - r) / 2 * np.sum(np.diag(F) * v**2)


# q6: all codewords have one length
def code_lengths(counts):
    return np.full(len(counts), int(np.ceil(np.log2(len(counts)))))


# q6: not the shortest
def code_lengths(counts):
    p = np.array(counts) / np.sum(counts)
    return np.ceil(-np.log2(p)).astype(int)


# q6: no decodable code has these lengths
def code_lengths(counts):
    return np.ones(len(counts))


# q6: whole number of bits
def code_lengths(counts):
    p = np.array(counts) / np.sum(counts)
    return -np.log2(p)


# q7: less than 0.8 is asked for
def allocate(sizes, ranges, traces, budget):
    return np.full(len(sizes), budget)


# q7: 8.000 bits a weight in the mean, 4 are allowed
def allocate(sizes, ranges, traces, budget):
    return np.full(len(sizes), 8)


# q7: whole numbers from 1 to 8
def allocate(sizes, ranges, traces, budget):
    return budget * traces / traces.mean()


# q7: weigh what a bit buys
def allocate(sizes, ranges, traces, budget):
    bits = np.ones(len(sizes), int)
    while True:
        cost = ranges**2 * traces / (2.0**bits - 1)**2
        fits = (bits < 8) & (sizes @ bits + sizes <= budget * sizes.sum())
        if not fits.any():
            return bits
        bits[np.where(fits, cost, -1).argmax()] += 1
