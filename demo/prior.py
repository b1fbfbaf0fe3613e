"""The stage of demo.sh about the prior over codes: codes to compare its codes with, and a table and a picture of both.

    python -m demo.prior codes --train FEATURES --out FOLDER
    python -m demo.prior report --train FEATURES --heldout FEATURES --prior RESULTS ... --out PICTURE.png

`codes` draws codes of two simpler models of the train codes: each position by itself, by the frequencies of its tokens;
and a mixture of products of such positions, fitted by EM. `report` compares bounds on the held-out codes, and images
that a DiTSEM drew for each kind of code with scans of real held-out digits.
"""

import numpy as np

COMPONENTS, EM_STEPS, SMOOTHING = 160, 60, 0.05


#################################################################################
#                          Simpler models of the codes                          #
#################################################################################


def token_frequencies(codes, V, weights=None, smoothing=SMOOTHING):
    """Of codes (n, L), weighted by (n, K): the frequencies of tokens at each position, (K, L, V), none of them 0."""
    weights = np.ones((len(codes), 1)) if weights is None else weights
    one_hot = np.eye(V)[codes].reshape(len(codes), -1)  # (n, L*V)
    counts = (weights.T @ one_hot).reshape(weights.shape[1], codes.shape[1], V) + smoothing
    return counts / counts.sum(axis=2, keepdims=True)


class Mixture:
    """A mixture of K products of independent positions; K = 1 is independent positions.

    Args:
        codes: (n, L) int64, which it is fitted to.
        seed: of the start: which codes the components start at.
    """

    def __init__(self, codes, V, K=COMPONENTS, seed=0):
        self.V = V
        rng = np.random.default_rng(seed)
        share = np.zeros((len(codes), K))
        if K == 1:
            share[:] = 1
        else:  # each code goes to the nearest of K of them
            centres = codes[rng.choice(len(codes), K, replace=False)]
            share[np.arange(len(codes)), (codes[:, None] != centres).sum(axis=2).argmin(axis=1)] = 1
        for _ in range(1 if K == 1 else EM_STEPS):
            self.weights = (share.sum(axis=0) + SMOOTHING) / (share + SMOOTHING / len(codes)).sum()
            self.log_p = np.log(token_frequencies(codes, V, share))  # (K, L, V)
            joint = self._joint(codes)
            share = np.exp(joint - np.logaddexp.reduce(joint, axis=1, keepdims=True))

    def _joint(self, codes):
        """log p(code, component), (n, K)."""
        return np.eye(self.V)[codes].reshape(len(codes), -1) @ self.log_p.reshape(len(self.log_p), -1).T + np.log(
            self.weights
        )

    def nats(self, codes):
        """-log p(code) / L, (n,): exact."""
        return -np.logaddexp.reduce(self._joint(codes), axis=1) / codes.shape[1]

    def draw(self, n, seed=0):
        """Codes (n, L)."""
        rng = np.random.default_rng(seed)
        component = rng.choice(len(self.weights), n, p=self.weights / self.weights.sum())
        bounds = np.exp(self.log_p).cumsum(axis=2)[component]  # (n, L, V)
        u = rng.random((*bounds.shape[:2], 1)) * bounds[..., -1:]
        return (bounds < u).sum(axis=2)
