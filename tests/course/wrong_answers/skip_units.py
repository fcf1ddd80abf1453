"""Typical wrong answers: above each stands its question and what the check has to say (a regular expression)."""
# ruff: noqa: F811

from math import comb

import numpy as np


# q1: share of the \*number\* of paths
def gradient_share(n, r, m):
    return comb(n, m) / 2**n


# q1: the total is not the number of paths
def gradient_share(n, r, m):
    return comb(n, m) * r**m / 2**n


# q1: it does not lose 1 - r there
def gradient_share(n, r, m):
    return comb(n, m) * r**m * (1 - r) ** (n - m)


# q2: passes through the units behind it
def lesion(x, M, l):
    for before in M[:l]:
        x = x + before @ x
    return M[l] @ x


# q2: units before this one have changed the state
def lesion(x, M, l):
    difference = M[l] @ x
    for behind in M[l + 1 :]:
        difference = difference + behind @ difference
    return difference


# q2: the shortcut is missing
def lesion(x, M, l):
    for before in M[:l]:
        x = x + before @ x
    for m in M[l:]:
        x = m @ x
    return x


# q2: the sign
def lesion(x, M, l):
    intact = off = x
    for number, m in enumerate(M):
        intact = intact + m @ intact
        off = off if number == l else off + m @ off
    return off - intact


# q3: over p, not over q
def gap(m, v, n, u):
    return 0.5 * (1 / v - 1 / u)


# q3: the means of p and q differ
def gap(m, v, n, u):
    return 0.5 * (1 / v - v / u**2)


# q3: the sign
def gap(m, v, n, u):
    return -0.5 * (1 / v - (v + (m - n) ** 2) / u**2)


# q3: the half
def gap(m, v, n, u):
    return 1 / v - (v + (m - n) ** 2) / u**2


# q4: the mean is over p
def divergence(mean_p, S_p, mean_q, S_q):
    inverse = np.linalg.inv(S_p)
    A = np.linalg.inv(S_q) - inverse
    return 0.5 * (np.trace(A @ S_q @ A) + np.sum((inverse @ (mean_p - mean_q)) ** 2))


# q4: the features vary together
def divergence(mean_p, S_p, mean_q, S_q):
    v, u = np.diag(S_p), np.diag(S_q)
    return 0.5 * np.sum(v * (1 / v - 1 / u) ** 2 + ((mean_p - mean_q) / u) ** 2)


# q4: by the inverse of S_q, twice
def divergence(mean_p, S_p, mean_q, S_q):
    inverse, d = np.linalg.inv(S_q), mean_p - mean_q
    A = np.linalg.inv(S_p) - inverse
    return 0.5 * (np.trace(A @ S_p @ A) + d @ inverse @ d)


# q4: S_p is missing
def divergence(mean_p, S_p, mean_q, S_q):
    inverse = np.linalg.inv(S_q)
    A = np.linalg.inv(S_p) - inverse
    return 0.5 * (np.trace(A @ A) + np.sum((inverse @ (mean_p - mean_q)) ** 2))


# q5: the weights are ignored
def cluster(scores, weights, k):
    from itertools import combinations

    rank = np.argsort(np.argsort(scores))
    every = [np.searchsorted(cuts, rank, side="right") for cuts in combinations(range(1, len(scores)), k - 1)]
    return min(every, key=lambda labels: sum(scores[labels == j].var() * (labels == j).sum() for j in range(k)))


# q5: can be reached
def cluster(scores, weights, k):
    return np.argsort(np.argsort(scores)) * k // len(scores)


# q5: the labels have to be 0, 1 and 2
def cluster(scores, weights, k):
    return 1 + np.argsort(np.argsort(scores)) * k // len(scores)


# q5: can be reached
def cluster(scores, weights, k):
    from itertools import combinations

    rank = np.argsort(np.argsort(scores))
    every = [np.searchsorted(cuts, rank, side="right") for cuts in combinations(range(1, len(scores)), k - 1)]
    return min(every, key=lambda labels: sum(weights[labels == j] @ (scores[labels == j] - scores[labels == j].mean()) ** 2
                                             for j in range(k)))


# q6: least error, and the luck
def choose_k(errors, images):
    return min(errors, key=errors.get)


# q6: root of the variance
def choose_k(errors, images):
    least = min(errors.values())
    return min(k for k, error in errors.items() if error <= least + least * (1 - least) / images)


# q6: the largest k within
def choose_k(errors, images):
    least = min(errors.values())
    return max(k for k, error in errors.items() if error <= least + np.sqrt(least * (1 - least) / images))


# q6: the search stopped too early
def choose_k(errors, images):
    least, k = min(errors.values()), min(errors, key=errors.get)
    smaller = sorted(one for one in errors if one < k)
    while smaller and errors[smaller[-1]] <= least + np.sqrt(least * (1 - least) / images):
        k = smaller.pop()
    return k


# q6: that of the least error
def choose_k(errors, images):
    least = min(errors.values())
    return min(k for k, error in errors.items() if error - np.sqrt(error * (1 - error) / images) <= least)


# q6: more than one standard error
def choose_k(errors, images):
    least = min(errors.values())
    return min(k for k, error in errors.items() if error <= least + 2 * np.sqrt(least * (1 - least) / images))


# q7: it has to be 0.15 more
def keep(T, y, m):
    mean, v = (np.array([getattr(T[y == c], part)(0) for c in range(3)]) for part in ("mean", "var"))
    scores = (v[:, None] * (1 / v[:, None] - 1 / v) ** 2 + ((mean[:, None] - mean) / v) ** 2).max((0, 1))
    return np.isin(np.arange(T.shape[1]), np.argsort(scores)[-m:])


# q7: units that say the same help once
def keep(T, y, m):
    wanted = np.eye(3)[y]
    fits = [np.abs(np.corrcoef(np.column_stack([unit, wanted]).T)[0, 1:]).max() for unit in T.T]
    return np.isin(np.arange(T.shape[1]), np.argsort(fits)[-m:])


# q7: units that say the same help once
def keep(T, y, m):
    return np.arange(T.shape[1]) < m


# q7: exactly 3 times True
def keep(T, y, m):
    return T.var(0) > 0
