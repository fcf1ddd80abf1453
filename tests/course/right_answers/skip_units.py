"""Other right answers: above each stands its question, and how it differs from the master's solution."""

from itertools import combinations
from math import comb

import numpy as np


# q1: as a binomial distribution
def gradient_share(n, r, m):
    chance = r / (1 + r)
    return comb(n, m) * chance**m * (1 - chance) ** (n - m)


# q2: runs both networks, in place
def lesion(x, M, l):
    def output():
        state = x.copy()
        for m in M:
            state += m @ state
        return state

    intact = output()
    M[l] = 0
    return intact - output()


# q3: by Gaussian quadrature
def gap(m, v, n, u):
    t, weights = np.polynomial.hermite_e.hermegauss(9)
    t = m + np.sqrt(v) * t
    return weights @ (((t - m) / v) ** 2 - ((t - n) / u) ** 2) / (2 * weights.sum())


# q4: by a root of the covariance
def divergence(mean_p, S_p, mean_q, S_q):
    root = np.linalg.cholesky(S_p)
    slopes = np.linalg.solve(S_p, root) - np.linalg.solve(S_q, root)
    return np.sum(slopes**2) / 2 + np.sum(np.linalg.solve(S_q, mean_q - mean_p) ** 2) / 2


# q5: by dynamic programming, other numbers for the same clusters
def cluster(scores, weights, k):
    n, order = len(scores), np.argsort(scores)
    s, w = scores[order], weights[order]
    best = {(0, 0): (0.0, [])}
    for j in range(1, k + 1):
        for end in range(j, n + 1):
            ways = []
            for begin in range(j - 1, end):
                if (j - 1, begin) in best:
                    spread = w[begin:end] @ (s[begin:end] - np.average(s[begin:end], weights=w[begin:end])) ** 2
                    ways.append((best[j - 1, begin][0] + spread, [*best[j - 1, begin][1], begin]))
            best[j, end] = min(ways)
    labels = np.zeros(n)
    for begin in best[k, n][1][1:]:
        labels[order[begin:]] += 1
    return k - 1 - labels


# q6: a loop from the smallest
def choose_k(errors, images):
    least = min(errors.values())
    for k in sorted(errors):
        if (errors[k] - least) ** 2 <= least * (1 - least) / images:
            return k


# q7: all sets, by the accuracy on the images that were given
def keep(T, y, m):
    def accuracy(kept):
        inputs = np.column_stack([T[:, kept], np.ones(len(T))])
        return np.mean((inputs @ np.linalg.lstsq(inputs, np.eye(3)[y], rcond=None)[0]).argmax(1) == y)

    return np.isin(np.arange(T.shape[1]), max(combinations(range(T.shape[1]), m), key=accuracy))
