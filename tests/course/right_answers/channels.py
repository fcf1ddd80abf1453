"""Other right answers: above each stands its question, and how it differs from the master's solution."""
# ruff: noqa: F811

from itertools import combinations

import numpy as np


# q1: by the rate
def louder(c):
    rate = np.divide(1, c)
    return rate - np.log(rate) - 1


# q2: an array, counted for one kernel and size of map
def savings(C, G, d):
    usual, third = C**2 * 9, G**2 * d * 9
    return np.array([usual / third, usual * 16 / (third * 16 * (C / G))])


# q3: one fraction
def noise_floor(B, n, m):
    return (B - 1) * (n + m) / (2 * n * m)


# q4: the line itself
def lost(x, y):
    slope, intercept = np.polyfit(x, y, 1)
    return np.var(y - slope * x - intercept) / np.var(y)


# q4: unbiased variances throughout
def lost(x, y):
    moments = np.cov(x, y)
    return 1 - moments[0, 1] ** 2 / (moments[0, 0] * moments[1, 1])


# q5: in place, a list
def fold(W, b, a, removed):
    for c in np.flatnonzero(removed):
        b += W[:, c] * a[:, c].mean()
    return [np.delete(W, np.flatnonzero(removed), axis=1), b]


# q6: predicts the removed channels
def absorb(W, b, a, removed):
    slopes = np.linalg.lstsq(np.column_stack([np.ones(len(a)), a[:, ~removed]]), a[:, removed], rcond=None)[0]
    return W[:, ~removed] + W[:, removed] @ slopes[1:].T, b + W[:, removed] @ slopes[0]


# q6: by covariances
def absorb(W, b, a, removed):
    moments, mean, kept = np.cov(a.T), a.mean(0), ~removed
    slopes = np.linalg.solve(moments[np.ix_(kept, kept)], moments[np.ix_(kept, removed)]).T
    return W[:, kept] + W[:, removed] @ slopes, b + W[:, removed] @ (mean[removed] - slopes @ mean[kept])


# q7: all sets, judged on the half of the places that they were not fitted to; a list
def keep(a, W, b, k):
    def error(kept):
        inputs = np.column_stack([a[:, kept], np.ones(len(a))])
        found = np.linalg.lstsq(inputs[::2], a[::2] @ W.T, rcond=None)[0]
        return np.mean((a[1::2] @ W.T - inputs[1::2] @ found) ** 2)

    best = min(combinations(range(a.shape[1]), k), key=error)
    return [c in best for c in range(a.shape[1])]
