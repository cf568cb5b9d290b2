"""Principal components of rows that come in batches (Ross et al. 2008, as scikit-learn's `IncrementalPCA` does it)."""

from __future__ import annotations

from peftc import plugin as p

#: Components are found by a low-rank decomposition of twice as many, with this seed and so many steps.
WIDTH, SEED, STEPS = 2, 42, 4


class Components:
    """The `count` strongest components `(count, features)` of all rows so far, each with its singular value and its share of the
    variance. `settled` says which of them the last batch did not turn."""

    def __init__(self, count: int, threshold: float) -> None:
        import torch

        self.count, self._threshold = count, threshold
        self.components: p.Tensor | None = None
        self.values: p.Tensor | None = None
        self.shares: p.Tensor | None = None
        self.settled = torch.zeros(count, dtype=torch.bool)
        self._seen = 0
        self._mean: p.Tensor | None = None
        self._variance: p.Tensor | None = None

    def add(self, rows: p.Tensor) -> None:
        """Take a batch `(n, features)`; one of fewer rows than components is left out."""
        import torch

        if len(rows) < self.count:
            return
        before = self.components
        matrix, mean, variance = self._centred(rows.float())
        total = self._seen + len(rows)
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            _, values, right = torch.svd_lowrank(matrix, q=WIDTH * self.count, niter=STEPS)
        found = right.mH
        strongest = found.abs().argmax(dim=1)
        found = found * found[torch.arange(len(found)), strongest].sign()[:, None]
        self._seen, self._mean, self._variance = total, mean, variance
        self.components, self.values = found[: self.count], values[: self.count]
        self.shares = (values**2 / (variance * total).sum())[: self.count]
        if before is not None:
            self.settled = torch.nn.functional.cosine_similarity(self.components, before) >= self._threshold

    def _centred(self, rows: p.Tensor) -> tuple[p.Tensor, p.Tensor, p.Tensor]:
        """The rows without their mean, beside what stands for those before; mean and variance of all."""
        import torch

        count, seen = len(rows), self._seen
        total, sums = seen + count, rows.sum(dim=0, dtype=torch.float64)
        apart = rows - sums / count
        spread = (apart**2).sum(dim=0) - apart.sum(dim=0) ** 2 / count
        if self._mean is None or self._variance is None or self.components is None or self.values is None:
            mean = sums / total
            return (rows - mean).to(rows.dtype), mean, spread / total
        former, ratio = self._mean * seen, seen / count
        mean = (former + sums) / total
        moved = ratio / total * (former / ratio - sums) ** 2
        variance = (self._variance * seen + spread + moved) / total
        own = rows.mean(dim=0)
        shift = (seen / total * count) ** 0.5 * (self._mean - own)
        return torch.vstack((self.values[:, None] * self.components, rows - own, shift)), mean, variance
