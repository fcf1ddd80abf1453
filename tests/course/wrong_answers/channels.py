"""Typical wrong answers: above each stands its question and what the check has to say (a regular expression)."""
# ruff: noqa: F811

import numpy as np


# q1: the other way round
def louder(c):
    return 0.5 * (c**2 - 1) - np.log(c)


# q1: not c
def louder(c):
    return 0.5 * (1 / c - 1 + np.log(c))


# q1: enters once
def louder(c):
    return 0.5 * (1 / c**2 - 1) + np.log(c**2)


# q1: this is in bits
def louder(c):
    return (0.5 * (1 / c**2 - 1) + np.log(c)) / np.log(2)


# q2: that is the printed claim
def savings(C, G, d):
    return C**2 / (G**2 * d), C**2 / (G**2 * d)


# q2: depth d of the kernel is missing
def savings(C, G, d):
    return C**2 / G**2, C / G


# q2: divided by the usual one's
def savings(C, G, d):
    return G**2 * d / C**2, G * d / C


# q2: has the shape \(\); it has to be \(2,\)
def savings(C, G, d):
    return C**2 / (G**2 * d)


# q3: rows and columns are exchanged
def kl_matrix(counts, s):
    p = (counts + s) / (counts + s).sum(1, keepdims=True)
    log = np.log(p)
    return (p * log).sum(1) - log @ p.T


# q3: do not add up to one
def kl_matrix(counts, s):
    p = (counts + s) / counts.sum(1, keepdims=True)
    log = np.log(p)
    return (p * log).sum(1, keepdims=True) - p @ log.T


# q3: this is in bits
def kl_matrix(counts, s):
    p = (counts + s) / (counts + s).sum(1, keepdims=True)
    log = np.log2(p)
    return (p * log).sum(1, keepdims=True) - p @ log.T


# q3: holds NaN
def kl_matrix(counts, s):
    p = counts / counts.sum(1, keepdims=True)
    with np.errstate(all="ignore"):
        log = np.log(p)
        return (p * log).sum(1, keepdims=True) - p @ log.T


# q4: that is the printed claim
def lost(x, y):
    return 1 - abs(np.corrcoef(x, y)[0, 1])


# q4: share that is explained
def lost(x, y):
    return np.corrcoef(x, y)[0, 1] ** 2


# q4: through the origin
def lost(x, y):
    return np.mean((y - x * (x @ y) / (x @ x)) ** 2) / y.var()


# q5: means of the removed channels are lost
def fold(W, b, a, removed):
    return W[:, ~removed], b


# q5: the sign is wrong
def fold(W, b, a, removed):
    return W[:, ~removed], b - W[:, removed] @ a[:, removed].mean(0)


# q5: columns of the channels that were removed
def fold(W, b, a, removed):
    return W[:, removed], b + W[:, removed] @ a[:, removed].mean(0)


# q5: has to give two things
def fold(W, b, a, removed):
    return b + W[:, removed] @ a[:, removed].mean(0)


# q6: that is fold
def absorb(W, b, a, removed):
    return W[:, ~removed], b + W[:, removed] @ a[:, removed].mean(0)


# q6: the intercept is missing
def absorb(W, b, a, removed):
    slope = np.linalg.lstsq(a[:, ~removed], a[:, removed], rcond=None)[0].T
    return W[:, ~removed] + W[:, removed] @ slope, b


# q6: bias is still the old one
def absorb(W, b, a, removed):
    centred = a - a.mean(0)
    slope = np.linalg.lstsq(centred[:, ~removed], centred[:, removed], rcond=None)[0].T
    return W[:, ~removed] + W[:, removed] @ slope, b


# q7: it has to be less
def keep(a, W, b, k):
    return np.isin(np.arange(a.shape[1]), np.argsort(a.var(0) * (W**2).sum(0))[-k:])


# q7: exactly 4 times True
def keep(a, W, b, k):
    return a.var(0) > 0


# q7: has to be a boolean array
def keep(a, W, b, k):
    return np.argsort(a.var(0))[-k:]


# q7: what the channels say together
def keep(a, W, b, k):
    rest = []  # the largest share of its own: each channel's variance that no single other one explains
    for c in range(a.shape[1]):
        rho = np.corrcoef(a.T)[c]
        rest.append((1 - np.sort(rho**2)[-2]) * a[:, c].var() * (W[:, c] ** 2).sum())
    return np.isin(np.arange(a.shape[1]), np.argsort(rest)[-k:])
