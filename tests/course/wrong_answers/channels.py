"""Typical wrong answers: above each stands its question and what the check has to say (a regular expression)."""
# ruff: noqa: F811

import numpy as np


# q1: KL of channel 2 from channel 1
def louder(c):
    return c - 1 - np.log(c)


# q1: formula for Gaussians
def louder(c):
    return 0.5 * (1 / c**2 - 1) + np.log(c)


# q1: entropy of channel 1 is missing
def louder(c):
    return np.log(c) + 1 / c


# q1: this is in bits
def louder(c):
    return (np.log(c) + 1 / c - 1) / np.log(2)


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


# q3: B - 1 free shares
def noise_floor(B, n, m):
    return B / 2 * (1 / n + 1 / m)


# q3: only one of them counts
def noise_floor(B, n, m):
    return (B - 1) / (2 * n)


# q3: variances of the two shares add up
def noise_floor(B, n, m):
    return (B - 1) / (2 * (n + m))


# q3: 4000 pairs of histograms of one density
def noise_floor(B, n, m):
    return (B - 1) * (1 / n + 1 / m)


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
