"""Typical wrong answers: above each stands its question and what the check has to say (a regular expression)."""
# ruff: noqa: F811

import numpy as np

from fishlib import course


# q1: the term p p\^T is missing
def output_fisher(p):
    return np.diag(p)


# q1: not independent
def output_fisher(p):
    return np.diag(p * (1 - p))


# q1: has the shape \(4,\)
def output_fisher(p):
    return p * (1 - p)


# q2: sum over the images
def diagonal(x, W):
    p = course.softmax(x @ W.T)
    return (p * (1 - p)).T @ x**2


# q2: is p \(1 - p\), not p
def diagonal(x, W):
    p = course.softmax(x @ W.T)
    return p.T @ x**2 / len(x)


# q2: has to be squared
def diagonal(x, W):
    p = course.softmax(x @ W.T)
    return (p * (1 - p)).T @ x / len(x)


# q2: 3 times
def diagonal(x, W):
    p = course.softmax(x @ W.T)
    return 3 * (p * (1 - p)).T @ x**2 / len(x)


# q3: ReLU is forgotten
def hidden_diagonal(x, W, V):
    p = course.softmax(np.maximum(x @ W.T, 0) @ V.T)
    return (p @ V**2 - (p @ V) ** 2).T @ x**2 / len(x)


# q3: term p p\^T is missing
def hidden_diagonal(x, W, V):
    a = x @ W.T
    p = course.softmax(np.maximum(a, 0) @ V.T)
    return (p @ V**2 * (a > 0)).T @ x**2 / len(x)


# q3: takes only the diagonal
def hidden_diagonal(x, W, V):
    a = x @ W.T
    p = course.softmax(np.maximum(a, 0) @ V.T)
    return ((p * (1 - p)) @ V**2 * (a > 0)).T @ x**2 / len(x)


# q4: printed formula with its slip
def trace_estimate(x, W, labels):
    r = np.eye(len(W))[labels] - course.softmax(x @ W.T)
    return ((r.T @ x / len(x)) ** 2).sum() / len(x)


# q4: expectation is B tr F
def trace_estimate(x, W, labels):
    r = np.eye(len(W))[labels] - course.softmax(x @ W.T)
    return ((r.T @ x) ** 2).sum()


# q4: each image's own gradient
def trace_estimate(x, W, labels):
    r = np.eye(len(W))[labels] - course.softmax(x @ W.T)
    return np.mean((r**2).sum(1) * (x**2).sum(1))


# q5: over-counts
def from_adam(v, m, B):
    return B * v


# q5: variance of the gradient
def from_adam(v, m, B):
    return B * (v - m**2)


# q5: of the mean of a batch
def from_adam(v, m, B):
    return v


# q6: \*half\*
def step_length(x, W, D, nats):
    p, u = course.softmax(x @ W.T), x @ D.T
    return np.sqrt(nats / np.mean((p * u**2).sum(1) - (p * u).sum(1) ** 2))


# q6: root is missing
def step_length(x, W, D, nats):
    p, u = course.softmax(x @ W.T), x @ D.T
    return 2 * nats / np.mean((p * u**2).sum(1) - (p * u).sum(1) ** 2)


# q6: is a variance
def step_length(x, W, D, nats):
    p, u = course.softmax(x @ W.T), x @ D.T
    return np.sqrt(2 * nats / np.mean((p * u**2).sum(1)))


# q7: it has to be less
def remove(x, W, k):
    gone = np.zeros(W.size, bool)
    gone[np.argsort(np.abs(W), axis=None)[:k]] = True
    return gone.reshape(W.shape)


# q7: a tenth less is asked for
def remove(x, W, k):
    p = course.softmax(x @ W.T)
    gone = np.zeros(W.size, bool)
    gone[np.argsort(W**2 * ((p * (1 - p)).T @ x**2), axis=None)[:k]] = True
    return gone.reshape(W.shape)


# q7: has to be a boolean array
def remove(x, W, k):
    return np.argsort(np.abs(W), axis=None)[:k]


# q7: exactly 10 times True
def remove(x, W, k):
    return np.abs(W) < 0.5
