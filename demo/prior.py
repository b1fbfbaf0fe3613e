"""The stages of demo.sh about the prior over codes: codes to compare with its codes, and tables and a picture of both.

    python -m demo.prior codes demo_output
    python -m demo.prior report demo_output

`codes` draws codes of two simpler models of the train codes: each position by itself, by the frequencies of its tokens;
and a mixture of products of such positions, fitted by EM. `report` compares bounds on the held-out codes, and images
that a DiTSEM drew for each kind of code with scans of real held-out digits; it writes prior.png, prior.txt, prior.json.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch

from demo.digits import DIRECTIONS, DigitReader, MainDirections, load_split
from demo.table import Demo, read_codes
from diffusion.masked import mean_bound
from dlc.data import Features
from dlc.data.images import image_grid
from dlc.machine.files import write_bytes
from dlc.sampling.prior_draw import newest_prior
from dlc.training.heldout import heldout_bounds
from dlc.weights.load import load_prior, process_of
from evaluation.metrics import FeatureStatistics, frechet_distance, precision_recall

EM_STEPS, SMOOTHING = 60, 0.05
SIMPLE = dict(mixture=320, independent=1)  # components; in the order in which --dlc-dir reads their files
NUM, GRID_COLUMNS = 360, 20
TITLES = {
    "real": "real train digits (the floor)",
    "heldout": "codes of held-out digits",
    "prior": "codes of the prior",
    "class": "codes of the prior, by class",
    "mixture": "codes of a mixture of 320 products",
    "independent": "codes of independent positions",
}
COLUMNS = {  # of the table of images
    "confident": "conf > 0.9",
    "frechet_pca": "FD pca",
    "frechet_hidden": "FD hidden",
    "recall": "recall",
    "classes": "class TV",
    "asked": "as asked",
    "copies": "copies",
    "within_two": "2 apart",
}
BARS = dict(  # of a prior that trains for 75 seconds on one core: 1 for at least, -1 for at most
    bound=(-1, 1.05),
    confident=(1, 0.80),
    frechet_pca=(-1, 0.15),
    frechet_hidden=(-1, 3.5),
    recall=(1, 0.60),
    classes=(-1, 0.12),
    copies=(-1, 0.01),
    within_two=(-1, 0.094),
    asked=(1, 0.95),
)


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

    def __init__(self, codes, V, K, seed=0):
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


#################################################################################
#                                 Judging images                                #
#################################################################################


class Judge:
    """Measures images of digits against the scans of real held-out ones.

    A small neural network (128 and 64 hidden units), fitted to the 8x8 train scans, reads the digits. Frechet distances
    are taken in the DIRECTIONS main directions of the train scans and in the network's last hidden units; recall
    (Kynkäänniemi et al. 2019, arXiv 1904.06991) in the main directions.
    """

    def __init__(self):
        from sklearn.neural_network import MLPClassifier

        (train_images, self.train_labels), (images, self.labels) = load_split("train"), load_split("heldout")
        self.train, self.heldout = DigitReader.scans(train_images), DigitReader.scans(images)
        self.network = MLPClassifier((128, 64), alpha=1e-3, max_iter=400, random_state=0)
        self.network.fit(self.train, self.train_labels)
        self.main_directions = MainDirections(self.train)
        self.shares = np.bincount(self.labels, minlength=10) / len(self.labels)

    def hidden(self, scans):
        for weights, bias in zip(self.network.coefs_[:-1], self.network.intercepts_[:-1]):
            scans = np.maximum(scans @ weights + bias, 0)
        return scans

    def frechet(self, features, scans):
        return frechet_distance(*(FeatureStatistics.of(features(part)) for part in (self.heldout, scans)))

    def __call__(self, scans, asked=None):
        """Figures of scans (n, 64), by name; with the digits that were asked for, how many are read as such."""
        p = self.network.predict_proba(scans)
        read = p.argmax(axis=1)
        recall = precision_recall(*map(self.main_directions, (self.heldout, scans)), precision="float32")[1]
        return dict(
            confident=float((p.max(axis=1) > 0.9).mean()),
            frechet_pca=self.frechet(self.main_directions, scans),
            frechet_hidden=self.frechet(self.hidden, scans),
            recall=recall,
            classes=float(np.abs(np.bincount(read, minlength=10) / len(read) - self.shares).sum() / 2),
            asked=None if asked is None else float((read == asked).mean()),
        )

    def floor(self, draws=5):
        """The figures of as many real train scans as there are held-out ones: the mean of a few draws of them."""
        rng, n = np.random.default_rng(0), len(self.heldout)
        found = [self(self.train[rng.choice(len(self.train), n, replace=False)]) for _ in range(draws)]
        return {key: None if key == "asked" else float(np.mean([one[key] for one in found])) for key in found[0]}


def distances(codes, train):
    """The share of codes equal to a train code, and of those within two tokens of one."""
    nearest = np.array([(train != code).sum(axis=1).min() for code in codes])
    return dict(copies=float((nearest == 0).mean()), within_two=float((nearest <= 2).mean()))


#################################################################################
#                                    Commands                                   #
#################################################################################


def simple_models(folder):
    """The simpler models of the train codes, by name."""
    codes, V = read_codes(folder / "features_train"), Features(folder / "features_train").V
    return {name: Mixture(codes, V, components) for name, components in SIMPLE.items()}


def draw_simple_codes(folder):
    """Write NUM codes of each of the simpler models."""
    out = folder / "simple_codes"
    out.mkdir(exist_ok=True)
    for name, model in simple_models(folder).items():
        np.save(out / f"{name}.npy", model.draw(NUM).astype(np.uint8))


def prior_bound(results, codes, labels=None):
    """A prior's bound on codes, at every number of masked tokens: a `Bound`, in nats a token."""
    model, meta = load_prior(newest_prior(results))
    kwargs = {} if labels is None else dict(y=torch.from_numpy(labels))
    codes = torch.from_numpy(codes)
    bounds = heldout_bounds(model, process_of(meta), codes, torch.arange(len(codes)), model.L, kwargs)
    return mean_bound(bounds, model.L)


def bounds_on_heldout(demo):
    """Nats a token of the held-out codes, by model: (figure, standard error or None)."""
    labels, results = demo.labels.astype(np.int64), demo.folder / "results_prior"
    return {
        "uniform tokens": (math.log(demo.features.V), None),
        **{
            TITLES[name].removeprefix("codes of "): (float(model.nats(demo.codes).mean()), None)
            for name, model in reversed(simple_models(demo.folder).items())
        },
        "the prior, at most": tuple(prior_bound(results, demo.codes)),
        "the prior, told the class, at most": tuple(prior_bound(results, demo.codes, labels)),
    }


def measure(demo, judge):
    """The figures of each kind of code, by name, and the images of each kind."""
    train, folder = read_codes(demo.folder / "features_train"), demo.folder
    images = dict(heldout=demo.samples("samples"), prior=demo.samples("samples_prior"))
    images["class"] = demo.samples("samples_prior_class")
    images.update(zip(SIMPLE, np.split(demo.samples("samples_simple"), len(SIMPLE))))
    codes = dict(heldout=demo.codes, prior=demo.prior_codes("samples_prior"))
    codes["class"] = demo.prior_codes("samples_prior_class")
    codes.update({name: read_codes(folder / f"simple_codes/{name}.npy") for name in SIMPLE})
    asked = dict(heldout=demo.labels, **{"class": np.arange(NUM) % 10})
    figures = dict(real=judge.floor())
    for name, these in images.items():
        figures[name] = dict(judge(DigitReader.scans(these), asked.get(name)), **distances(codes[name], train))
    return figures, images


def missed_bars(nats, figures):
    """Which of BARS the prior misses, in words."""
    values = dict(figures["prior"], bound=nats, asked=figures["class"]["asked"])
    return [
        f"{key} {values[key]:.3f}, wanted {'at least' if sign > 0 else 'at most'} {bar}"
        for key, (sign, bar) in BARS.items()
        if sign * values[key] < sign * bar
    ]


def lines_of(bounds, figures, missed):
    """Both tables, line by line."""
    yield f"held-out codes, nats a token{'':13}"
    for name, (nats, error) in bounds.items():
        yield f"{name:36}{nats:7.3f}" + (f" +- {error:.3f}" if error else "")
    yield f"\nimages, {NUM} of each kind{'':11}" + "".join(f"{title:>11}" for title in COLUMNS.values())
    for name, values in figures.items():
        cells = ("" if values.get(key) is None else f"{values[key]:.3f}" for key in COLUMNS)
        yield f"{TITLES[name]:36}" + "".join(f"{cell:>11}" for cell in cells)
    yield "bars for the prior: " + ("missed: " + "; ".join(missed) if missed else "all met")


def report(folder):
    """Write the tables and the picture, and print them."""
    demo, judge = Demo(folder), Judge()
    bounds, (figures, images) = bounds_on_heldout(demo), measure(demo, judge)
    missed = missed_bars(bounds["the prior, at most"][0], figures)
    text = "\n".join(lines_of(bounds, figures, missed)) + "\n"
    write_bytes(folder / "prior.txt", text.encode())
    values = dict(bounds=bounds, images=figures, missed=missed)
    write_bytes(folder / "prior.json", (json.dumps(values, indent=1) + "\n").encode())
    rows = np.concatenate([images["prior"][: 4 * GRID_COLUMNS], images["independent"][:GRID_COLUMNS]])
    image_grid(rows, GRID_COLUMNS).save(folder / "prior.png")
    print(
        f"\n{text}\n"
        f"FD: Frechet distance to the scans of the held-out digits, in the {DIRECTIONS} main directions of the\n"
        "train scans and in the hidden units of a small network. TV: total variation of the shares of digits.\n"
        "Copies: of train codes; 2 apart: within two tokens of one.\n"
        f"look at {folder / 'prior.png'}: digits from nothing, of codes that the prior drew; bottom row: independent "
        "positions"
    )


def main():
    parser = argparse.ArgumentParser(description="Compare a prior's codes with simpler ones, by bounds and images.")
    parser.add_argument("command", choices=["codes", "report"], help="draw the simpler models' codes, or report")
    parser.add_argument("folder", type=Path, help="read and write in this folder, which demo.sh fills")
    args = parser.parse_args()
    (draw_simple_codes if args.command == "codes" else report)(args.folder)


if __name__ == "__main__":
    main()
