"""Typical wrong answers: for each question, code in place of the solution and a part of what the check has to say."""

START = """
import numpy as np
from fishlib import course
"""

WRONG = {
    "q1": [
        ("def output_fisher(p):\n    return np.diag(p)", r"the term p p\^T is missing"),
        ("def output_fisher(p):\n    return np.diag(p * (1 - p))", "not independent"),
        ("def output_fisher(p):\n    return p * (1 - p)", r"has the shape \(4,\)"),
    ],
    "q2": [
        ("def diagonal(x, W):\n    p = course.softmax(x @ W.T)\n    return (p * (1 - p)).T @ x**2", "sum over the images"),
        ("def diagonal(x, W):\n    p = course.softmax(x @ W.T)\n    return p.T @ x**2 / len(x)", r"is p \(1 - p\), not p"),
        ("def diagonal(x, W):\n    p = course.softmax(x @ W.T)\n    return (p * (1 - p)).T @ x / len(x)", "has to be squared"),
        ("def diagonal(x, W):\n    p = course.softmax(x @ W.T)\n    return 3 * (p * (1 - p)).T @ x**2 / len(x)", "3 times"),
    ],
    "q3": [
        ("def hidden_diagonal(x, W, V):\n    p = course.softmax(np.maximum(x @ W.T, 0) @ V.T)\n"
         "    return (p @ V**2 - (p @ V) ** 2).T @ x**2 / len(x)", "ReLU is forgotten"),
        ("def hidden_diagonal(x, W, V):\n    a = x @ W.T\n    p = course.softmax(np.maximum(a, 0) @ V.T)\n"
         "    return (p @ V**2 * (a > 0)).T @ x**2 / len(x)", r"term p p\^T is missing"),
        ("def hidden_diagonal(x, W, V):\n    a = x @ W.T\n    p = course.softmax(np.maximum(a, 0) @ V.T)\n"
         "    return ((p * (1 - p)) @ V**2 * (a > 0)).T @ x**2 / len(x)", "takes only the diagonal"),
    ],
    "q4": [
        ("def trace_estimate(x, W, labels):\n    r = np.eye(len(W))[labels] - course.softmax(x @ W.T)\n"
         "    return ((r.T @ x / len(x)) ** 2).sum() / len(x)", "printed formula with its slip"),
        ("def trace_estimate(x, W, labels):\n    r = np.eye(len(W))[labels] - course.softmax(x @ W.T)\n"
         "    return ((r.T @ x) ** 2).sum()", "expectation is B tr F"),
        ("def trace_estimate(x, W, labels):\n    r = np.eye(len(W))[labels] - course.softmax(x @ W.T)\n"
         "    return np.mean((r**2).sum(1) * (x**2).sum(1))", "each image's own gradient"),
    ],
    "q5": [
        ("def from_adam(v, m, B):\n    return B * v", "over-counts"),
        ("def from_adam(v, m, B):\n    return B * (v - m**2)", "variance of the gradient"),
        ("def from_adam(v, m, B):\n    return v", "of the mean of a batch"),
    ],
    "q6": [
        ("def step_length(x, W, D, nats):\n    p, u = course.softmax(x @ W.T), x @ D.T\n"
         "    return np.sqrt(nats / np.mean((p * u**2).sum(1) - (p * u).sum(1) ** 2))", r"\*half\*"),
        ("def step_length(x, W, D, nats):\n    p, u = course.softmax(x @ W.T), x @ D.T\n"
         "    return 2 * nats / np.mean((p * u**2).sum(1) - (p * u).sum(1) ** 2)", "root is missing"),
        ("def step_length(x, W, D, nats):\n    p, u = course.softmax(x @ W.T), x @ D.T\n"
         "    return np.sqrt(2 * nats / np.mean((p * u**2).sum(1)))", "is a variance"),
    ],
    "q7": [
        ("def remove(x, W, k):\n    gone = np.zeros(W.size, bool)\n    gone[np.argsort(np.abs(W), axis=None)[:k]] = True\n"
         "    return gone.reshape(W.shape)", "it has to be less"),
        ("def remove(x, W, k):\n    p = course.softmax(x @ W.T)\n    gone = np.zeros(W.size, bool)\n"
         "    gone[np.argsort(W**2 * ((p * (1 - p)).T @ x**2), axis=None)[:k]] = True\n    return gone.reshape(W.shape)",
         "a tenth less is asked for"),
        ("def remove(x, W, k):\n    return np.argsort(np.abs(W), axis=None)[:k]", "has to be a boolean array"),
        ("def remove(x, W, k):\n    return np.abs(W) < 0.5", "exactly 8 times True"),
    ],
}
