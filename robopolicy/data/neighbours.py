"""What the other episodes of a dataset say about a step: nearest neighbours, local regression, entropy.

Steps of one episode resemble each other because they follow each other, so a step is only ever compared with the steps
of other episodes. All functions work on normalised points: one column, one unit of spread.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree
from scipy.special import digamma, gammaln

_BLOCK_VALUES = 8_000_000  # float64 of the largest intermediate array
_RIDGE = 1e-3  # of the neighbours' own spread; keeps the regression defined where they lie in a line or a plane


def other_episode_neighbours(
    points: np.ndarray, episodes: np.ndarray, steps: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` nearest steps of other episodes.

    Args:
        points: (N, d) normalised points.
        episodes: (N,) episode of each point.
        steps: (M,) the points that are asked about.
        k: at most the number of points outside each asked point's episode.

    Returns:
        Their indices and Euclidean distances, each (M, k), nearest first.
    """
    tree = cKDTree(points)
    index = np.empty((len(steps), k), dtype=np.int64)
    distance = np.empty((len(steps), k))
    open_rows = np.arange(len(steps))
    wanted = 2 * k
    while len(open_rows):
        wanted = min(wanted, len(points))
        unfinished = []
        block = max(1, _BLOCK_VALUES // wanted)
        for rows in np.array_split(open_rows, -(-len(open_rows) // block)):
            found_distance, found = tree.query(points[steps[rows]], k=wanted, workers=-1)
            foreign = episodes[found] != episodes[steps[rows], None]
            done = foreign.sum(axis=1) >= k
            order = np.argsort(~foreign[done], axis=1, kind="stable")[:, :k]
            index[rows[done]] = np.take_along_axis(found[done], order, axis=1)
            distance[rows[done]] = np.take_along_axis(found_distance[done], order, axis=1)
            unfinished.append(rows[~done])
        open_rows = np.concatenate(unfinished)
        wanted *= 4
    return index, distance


def local_linear_residuals(
    points: np.ndarray, targets: np.ndarray, steps: np.ndarray, neighbours: np.ndarray
) -> np.ndarray:
    """How far each step's target is from what its neighbours predict for it.

    The prediction is a linear regression on the neighbours (Cleveland 1979, without his weights), which follows a
    target that changes with the point, where a plain mean would take the slope for noise. A residual ``r`` has the
    variance ``noise * (1 + leverage)``; the result is ``r / sqrt(1 + leverage)``, so that the mean of its square
    estimates the variance of the noise. What remains is the curvature inside the neighbourhood.

    Args:
        points: (N, d) normalised points.
        targets: (N, t) values to predict.
        steps: (M,) the points that are asked about.
        neighbours: (M, k) indices of their neighbours, which do not contain them.

    Returns:
        (M, t) residuals in units of the targets.
    """
    d, k = points.shape[1], neighbours.shape[1]
    block = max(1, _BLOCK_VALUES // (k * (d + 1)))
    parts = [
        _residuals(points, targets, steps[start : start + block], neighbours[start : start + block])
        for start in range(0, len(steps), block)
    ]
    return np.concatenate(parts)


def _residuals(points: np.ndarray, targets: np.ndarray, steps: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    near, values = points[neighbours], targets[neighbours]
    centre, level = near.mean(axis=1, keepdims=True), values.mean(axis=1, keepdims=True)
    near, values = near - centre, values - level
    query = points[steps] - centre[:, 0]
    gram = near.transpose(0, 2, 1) @ near
    d = gram.shape[1]
    scale = np.trace(gram, axis1=1, axis2=2) / d
    gram += (_RIDGE * scale + np.finfo(np.float64).tiny)[:, None, None] * np.eye(d)
    # The prediction is a weighted sum of the neighbours' targets; these are the weights.
    weights = 1 / near.shape[1] + np.einsum("mkd,md->mk", near, np.linalg.solve(gram, query[..., None])[..., 0])
    predicted = level[:, 0] + np.einsum("mk,mkt->mt", weights, values)
    leverage = (weights**2).sum(axis=1, keepdims=True)
    return (targets[steps] - predicted) / np.sqrt(1 + leverage)


def entropy(distance: np.ndarray, others: np.ndarray, k: int, dimensions: int) -> np.ndarray:
    """Surprise of each step, whose mean is the differential entropy by Kozachenko and Leonenko (1987), in nats.

    ``digamma(n) - digamma(k) + log(volume of the unit ball) + d log(distance to the k-th neighbour)`` with ``n``
    points to choose from, which converges to the entropy in the steps' units as ``n`` grows (Kraskov et al. 2004).

    Args:
        distance: (M,) distance to the k-th neighbour.
        others: (M,) or (), the number of points among which the neighbour was searched.
        dimensions: of the points.
    """
    ball = 0.5 * dimensions * np.log(np.pi) - gammaln(0.5 * dimensions + 1)
    smallest = np.finfo(np.float32).eps  # stored values are float32: equal ones are closer than this
    return digamma(others) - digamma(k) + ball + dimensions * np.log(np.maximum(distance, smallest))
