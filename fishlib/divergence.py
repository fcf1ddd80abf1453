"""Divergences between densities, and measures of dependence between features and labels.

Features are rows of a tensor (N, D); labels are integers (N,). Logarithms are natural, so information is in nats.
Everything runs on the device and, where nothing else is said, in the floating-point type of what is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Score = Callable[[Tensor], Tensor]

# Fisher divergence: how much the gradients of two log-densities differ.


def fisher_divergence(mean_p: Tensor, var_p: Tensor, mean_q: Tensor, var_q: Tensor) -> Tensor:
    """Fisher divergence of Gaussians with diagonal covariances, exact, summed over features.

    ``1/2 E_p |grad log p - grad log q|^2 = 1/2 sum_d [ v_p (1/v_p - 1/v_q)^2 + ((mu_p - mu_q) / v_q)^2 ]``

    Not symmetric, and not free of scale: features c x have a divergence 1 / c^2 as large.

    Parameters
    ----------
    mean_p, var_p, mean_q, var_q : tensors (..., D) that broadcast; variances are positive

    Examples
    --------
    >>> float(fisher_divergence(*map(torch.tensor, ([5.0], [1.0], [5.0], [2.0]))))
    0.125
    """
    _check_positive(var_p, var_q)
    return 0.5 * (var_p * (1 / var_p - 1 / var_q) ** 2 + ((mean_p - mean_q) / var_q) ** 2).sum(-1)


def published_divergence(mean_p: Tensor, var_p: Tensor, mean_q: Tensor, var_q: Tensor) -> Tensor:
    """What the code published with skip-unit pruning computes in place of `fisher_divergence`, summed over features.

    ``sum_d [ v_p (1/v_p - 1/v_q)^2 + (mu_p/v_p - mu_q/v_q)^2 ]``: without the half, and different for densities that are
    moved together. It is no divergence between densities, and is here to be compared.
    """
    _check_positive(var_p, var_q)
    return (var_p * (1 / var_p - 1 / var_q) ** 2 + (mean_p / var_p - mean_q / var_q) ** 2).sum(-1)


def fisher_divergence_pairs(mean: Tensor, var: Tensor) -> Tensor:
    """`fisher_divergence` of all ordered pairs among K Gaussians at once, as products of matrices.

    Parameters
    ----------
    mean, var : tensors (K, D)

    Returns
    -------
    Tensor (K, K), float64: entry (i, j) is D_F(p_i, p_j)
    """
    _check_positive(var)
    mean, var = mean.double(), var.double()
    mean = mean - mean.mean(0)  # the divergence stays; the products below lose fewer digits
    precision = 1 / var
    squared, total = precision.square(), precision.sum(1)
    first = total[:, None] - 2 * total[None, :] + var @ squared.T
    second = mean.square() @ squared.T - 2 * mean @ (mean * squared).T + (mean.square() * squared).sum(1)
    return (0.5 * (first + second)).clamp_min(0).fill_diagonal_(0)


def fisher_divergence_gaussian(mean_p: Tensor, cov_p: Tensor, mean_q: Tensor, cov_q: Tensor) -> Tensor:
    """Fisher divergence of Gaussians with full covariances, exact.

    ``1/2 [ tr(S_p A^2) + |S_q^-1 (mu_p - mu_q)|^2 ]`` with ``A = S_p^-1 - S_q^-1``

    Parameters
    ----------
    mean_p, mean_q : tensors (D,)
    cov_p, cov_q : tensors (D, D), positive definite
    """
    inverse_p, inverse_q = (torch.cholesky_inverse(_cholesky(cov)) for cov in (cov_p, cov_q))
    a = inverse_p - inverse_q
    return 0.5 * (torch.trace(cov_p @ a @ a) + (inverse_q @ (mean_p - mean_q)).square().sum())


def shrunk_covariance(x: Tensor, shrinkage: float = 0.1) -> Tensor:
    """``(1 - s) S + s tr(S)/D I`` of rows x (N, D), S with divisor N: positive definite whenever the rows differ."""
    centred = x - x.mean(0)
    cov = centred.T @ centred / len(x)
    return (1 - shrinkage) * cov + shrinkage * cov.trace() / len(cov) * torch.eye(len(cov), dtype=x.dtype, device=x.device)


def hyvarinen_score(x: Tensor, score: Score) -> Tensor:
    """Hyvarinen score ``s(x, p) = 1/2 |grad log p(x)|^2 + laplacian log p(x)`` of each row, shape (N,).

    Its mean over samples of p ranks models q as the Fisher divergence does, without the density of p:
    ``E_p s(x, q) = D_F(p, q) - 1/2 E_p |grad log p|^2`` [Hyvarinen 2005]. The Laplacian is exact: D backward passes.

    Parameters
    ----------
    x : tensor (N, D)
    score : grad log p, a function of rows (N, D) to rows (N, D), each row for itself
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        gradient = score(x)
        if not gradient.requires_grad:  # a constant score
            laplacian = gradient.new_zeros(len(x))
        else:
            laplacian = sum(torch.autograd.grad(gradient[:, d].sum(), x, retain_graph=True)[0][:, d]
                            for d in range(x.shape[1]))
    return (0.5 * gradient.square().sum(1) + laplacian).detach()


def fisher_divergence_sampled(x: Tensor, score_p: Score, score_q: Score) -> Tensor:
    """``1/2 mean |grad log p - grad log q|^2`` over rows x (N, D) drawn from p: a sampled estimate of D_F(p, q)."""
    with torch.no_grad():
        return 0.5 * (score_p(x) - score_q(x)).square().sum(1).mean()


def fit_score(x: Tensor, steps: int = 500, hidden: int = 64, lr: float = 3e-3, batch: int = 256, seed: int = 0) -> nn.Module:
    """A small network for ``grad log p`` of the density of rows x (N, D), by sliced score matching [Song et al. 2019].

    Minimises ``E_v [ v^T (ds/dx) v + 1/2 |s|^2 ]`` with one Gaussian direction v for each row and step (the
    variance-reduced form): the Hyvarinen score of the model without its Laplacian. Random state stays as it is.

    Parameters
    ----------
    steps, batch, lr : steps of Adam, rows in each, learning rate (falling to 0 as a cosine)
    hidden : width of the two hidden layers
    """
    _check_rows(x)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
        net = nn.Sequential(nn.Linear(x.shape[1], hidden), nn.Softplus(), nn.Linear(hidden, hidden), nn.Softplus(),
                            nn.Linear(hidden, x.shape[1]))
    net = net.to(x.device, x.dtype)
    optimizer = torch.optim.Adam(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            chosen = torch.randint(len(x), (min(batch, len(x)),), generator=generator)
            rows = x[chosen.to(x.device)].detach().requires_grad_()
            v = torch.randn(rows.shape, generator=generator, dtype=x.dtype).to(x.device)
            gradient = net(rows)
            slope = torch.autograd.grad((gradient * v).sum(), rows, create_graph=True)[0]
            loss = ((slope * v).sum(1) + 0.5 * gradient.square().sum(1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval().requires_grad_(False)


# Kullback-Leibler and Jensen-Shannon: how much one density is surprised by samples of another.


def kl_gaussian(mean_p: Tensor, var_p: Tensor, mean_q: Tensor, var_q: Tensor) -> Tensor:
    """KL(p || q) of Gaussians with diagonal covariances, exact, in nats, summed over features [Kullback and Leibler 1951].

    ``1/2 sum_d [ v_p/v_q - 1 - log(v_p/v_q) + (mu_p - mu_q)^2 / v_q ]``; the same for features c x.

    Parameters
    ----------
    mean_p, var_p, mean_q, var_q : tensors (..., D) that broadcast; variances are positive
    """
    _check_positive(var_p, var_q)
    ratio = var_p / var_q
    return 0.5 * (ratio - 1 - ratio.log() + (mean_p - mean_q).square() / var_q).sum(-1)


def kl_gaussian_full(mean_p: Tensor, cov_p: Tensor, mean_q: Tensor, cov_q: Tensor) -> Tensor:
    """KL(p || q) of Gaussians with full covariances, exact, in nats.

    ``1/2 [ tr(S_q^-1 S_p) - D + log det S_q - log det S_p + (mu_p - mu_q)^T S_q^-1 (mu_p - mu_q) ]``

    Parameters
    ----------
    mean_p, mean_q : tensors (D,)
    cov_p, cov_q : tensors (D, D), positive definite
    """
    lower_p, lower_q = _cholesky(cov_p), _cholesky(cov_q)
    whitened = torch.linalg.solve_triangular(lower_q, torch.cat([lower_p, (mean_p - mean_q)[:, None]], 1), upper=False)
    logdet = 2 * (lower_q.diagonal().log() - lower_p.diagonal().log()).sum()
    return 0.5 * (whitened.square().sum() - len(mean_p) + logdet)


def js_gaussian_full(mean_p: Tensor, cov_p: Tensor, mean_q: Tensor, cov_q: Tensor, samples: int = 10_000,
                     seed: int = 0) -> Tensor:
    """Jensen-Shannon divergence of Gaussians with full covariances, in nats, between 0 and log 2, sampled.

    ``1/2 KL(p || m) + 1/2 KL(q || m)``, ``m = (p + q) / 2``. The mixture m is no Gaussian, so there is no closed form:
    the mean of ``log 2 - softplus(log q - log p)`` over samples of p, and the same with p and q exchanged. Unbiased, with a
    standard error below ``log 2 / sqrt(samples)``. Diagonal covariances go in as ``torch.diag(var)``.
    """
    p, q = (torch.distributions.MultivariateNormal(mean, scale_tril=_cholesky(cov))
            for mean, cov in ((mean_p, cov_p), (mean_q, cov_q)))
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros_like(mean_p[0])
    for one, other in ((p, q), (q, p)):
        x = torch.randn(samples, len(mean_p), generator=generator, dtype=mean_p.dtype).to(mean_p.device)
        x = one.loc + x @ one.scale_tril.T
        total = total + 0.5 * (math.log(2) - F.softplus(other.log_prob(x) - one.log_prob(x)).mean())
    return total


def kl_histogram_pairs(counts: Tensor, others: Tensor | None = None, smoothing: float = 0.5) -> Tensor:
    """KL(p_i || q_j) in nats between all rows of counts, as one product of matrices: ``sum_b p log p - p . log q``.

    `smoothing` is added to each count, so an empty bin costs a finite amount; bins wider than the density's features bias
    the estimate downwards, few counts bias it upwards by about ``(bins - 1) / 2 (1/N_p + 1/N_q)`` for equal densities.

    Parameters
    ----------
    counts : tensor (C, B), on common bins
    others : tensor (C', B); `counts` itself by default

    Returns
    -------
    Tensor (C, C'), float64
    """
    p = _probabilities(counts, smoothing)
    q = p if others is None else _probabilities(others, smoothing)
    matrix = ((p * p.log()).sum(1, keepdim=True) - p @ q.log().T).clamp_min(0)
    return matrix.fill_diagonal_(0) if others is None else matrix


def js_histogram_pairs(counts: Tensor, others: Tensor | None = None, smoothing: float = 0.5) -> Tensor:
    """Jensen-Shannon divergence in nats, between 0 and log 2, of all pairs of rows; as `kl_histogram_pairs` otherwise.

    ``H((p + q) / 2) - H(p)/2 - H(q)/2`` with entropies H.
    """
    p = _probabilities(counts, smoothing)
    q = p if others is None else _probabilities(others, smoothing)
    entropy_p, entropy_q = (-(one * one.log()).sum(1) for one in (p, q))
    rows = max(1, (1 << 22) // q.numel())  # mixtures of so many rows with all others fit into 32 MiB
    mixed = torch.cat([torch.special.entr((part[:, None] + q[None]) / 2).sum(2) for part in p.split(rows)])
    return (mixed - entropy_p[:, None] / 2 - entropy_q[None, :] / 2).clamp(0, math.log(2))


def kl_nearest_neighbours(x: Tensor, y: Tensor, k: int = 5) -> Tensor:
    """KL(p || q) in nats from rows x (N, D) of p and y (M, D) of q, by distances to the k-th neighbour [Wang et al. 2009].

    ``D mean_i log(nu_k(i) / rho_k(i)) + log(M / (N - 1))``, rho the distance within x, nu that to y. Asymptotically
    unbiased; with few rows and many features it is biased towards 0, and it may be negative.

    Raises
    ------
    ValueError
        fewer than k + 1 rows of x or k of y, or rows that repeat so often that a distance is 0
    """
    _check_rows(x, y)
    if not 1 <= k < len(x) or k > len(y):
        raise ValueError(f"k={k}: x needs more than k rows and y at least k, got {len(x)} and {len(y)}")
    exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}
    within = torch.cdist(x, x, **exact).fill_diagonal_(math.inf).kthvalue(k, 1).values
    across = torch.cdist(x, y, **exact).kthvalue(k, 1).values
    if not (within > 0).all() or not (across > 0).all():
        raise ValueError(f"some rows repeat more than {k} times, at distance 0: raise k, or use histograms for densities with "
                         "atoms, such as activations behind a ReLU")
    return x.shape[1] * (across.log() - within.log()).mean() + math.log(len(y) / (len(x) - 1))


def _probabilities(counts: Tensor, smoothing: float) -> Tensor:
    if counts.ndim != 2 or not smoothing > 0 or not ((counts >= 0) & (counts < math.inf)).all():
        raise ValueError(f"counts of shape {tuple(counts.shape)} with smoothing {smoothing}: give counts (C, B), all of them "
                         "finite and none negative, and a positive smoothing")
    counts = counts.double() + smoothing
    return counts / counts.sum(1, keepdim=True)


# Dependence of features on labels, without a model of their density.


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """``2 E|X - Y| - E|X - X'| - E|Y - Y'|`` over all pairs of rows x (N, D) and y (M, D) [Szekely and Rizzo 2013].

    At least 0, but for rounding. The pairs of a row with itself count (V-statistic), which biases it upwards: for equal
    densities by ``(1/N + 1/M) E|X - X'|``.
    """
    _check_rows(x, y)
    origin = torch.cat([x, y]).mean(0)
    x, y = x - origin, y - origin
    return 2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()


def distance_correlation(x: Tensor, labels: Tensor) -> Tensor:
    """Distance correlation of rows x (N, D) and labels (N,), between 0 and 1 [Szekely et al. 2007], V-statistic.

    Labels lie at distance 1 if they differ, so the covariance is an energy distance between the classes. Biased upwards:
    labels of K equally frequent classes that tell nothing have ``((K - 1) / (N - 1))^(1/4)`` where D is far above N, and
    less where it is not.
    """
    _check_rows(x)
    a = _centred(_distances(x))
    b = _centred((labels[:, None] != labels[None, :]).to(x.dtype))
    scale = torch.sqrt(a.square().mean() * b.square().mean())
    return torch.sqrt(((a * b).mean() / scale).clamp_min(0)) if scale > 0 else scale


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Centred kernel alignment with linear kernels, ``|X^T Y|^2 / (|X^T X| |Y^T Y|)`` of centred rows, in [0, 1].

    [Kornblith et al. 2019]. Biased upwards where rows are few: independent x and y of far more features than rows have
    nearly 1, and x with the one-hot labels of K equally frequent classes ``sqrt((K - 1) / (N - 1))``.
    """
    _check_rows(x, y)
    x, y = x - x.mean(0), y - y.mean(0)
    scale = (x.T @ x).norm() * (y.T @ y).norm()
    return (x.T @ y).square().sum() / scale if scale > 0 else scale


def kde_mutual_information(x: Tensor, labels: Tensor, bandwidth: float | None = None) -> Tensor:
    """Mutual information of rows x (N, D) and labels (N,) in nats, from kernel densities, each row left out of its own.

    ``mean_i log p(x_i | y_i) - log sum_c p(c) p(x_i | c)`` with Gaussian kernels [Moon et al. 1995]; at most the entropy of
    the labels. Biased downwards, far below 0 where D is large beside log N: a row that is left out has few others near it.

    Parameters
    ----------
    bandwidth : standard deviation of the kernel; by default Scott's ``N^(-1/(D+4))`` [Scott 1992] times the root mean variance
    """
    _check_rows(x)
    if bandwidth is None:
        bandwidth = len(x) ** (-1 / (x.shape[1] + 4)) * float(x.var(0, correction=0).mean().sqrt())
        if bandwidth == 0:  # constant features tell nothing
            return x.new_zeros(())
    if not bandwidth > 0:
        raise ValueError(f"bandwidth={bandwidth}: a kernel needs a positive standard deviation")
    logs = -0.5 * _distances(x).square() / bandwidth**2
    logs.fill_diagonal_(-math.inf)
    member = F.one_hot(labels, int(labels.max()) + 1).to(x.dtype)
    counts, prior = member.sum(0), member.mean(0)
    if (counts[counts > 0] < 2).any():
        raise ValueError("a class has a single row: kernel densities that leave rows out need two or more in each")
    top = logs.max(1, keepdim=True).values
    others = counts[None, :] - member  # rows of each class, the row itself not counted
    density = (torch.exp(logs - top) @ member) / others.clamp_min(1) + torch.finfo(x.dtype).tiny
    own = density.gather(1, labels[:, None]).squeeze(1)
    return (own.log() - (density @ prior).log()).mean()


def _distances(x: Tensor) -> Tensor:
    """Between all rows; centred first, because the products within cdist lose digits far from the origin."""
    x = x - x.mean(0)
    return torch.cdist(x, x)


def _centred(distances: Tensor) -> Tensor:
    return distances - distances.mean(0) - distances.mean(1, keepdim=True) + distances.mean()


def _cholesky(cov: Tensor) -> Tensor:
    lower, failed = torch.linalg.cholesky_ex(cov)
    if failed or not torch.isfinite(lower).all():
        raise ValueError("a covariance is not positive definite (or not a number): see shrunk_covariance")
    return lower


def _check_positive(*variances: Tensor) -> None:
    if any(not (var > 0).all() for var in variances):
        raise ValueError("a variance is not positive (or not a number): raise small variances to a floor first")


def _check_rows(*arrays: Tensor) -> None:
    for x in arrays:
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(f"features of shape {tuple(x.shape)}: give two rows or more, (N, D)")
        if not torch.isfinite(x).all():
            raise ValueError("features are not finite: look for NaN or infinity in what computed them")
