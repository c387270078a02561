"""Rejection sampling: many candidates are drawn and scored, and the best share of them is kept.

Source: Razavi et al. 2019 (VQ-VAE-2), section 3.3: the score is a classifier's probability of the class that the sample
was drawn for, so a share is kept of each class by itself. It trades diversity for quality.
Not here: any scorer. It is given: (images uint8 [n, h, w, c], labels int32 [n] or None) -> [n], higher is better.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from bitsperdim import flag_values, metrics
from bitsperdim.errors import InputError

Scorer = Callable[[np.ndarray, np.ndarray | None], Any]


class Candidates(NamedTuple):
    """`rounds` samples for each of `num` places of a grid; those of a place are all of its class."""

    images: dict[tuple[int, int], UInt8[np.ndarray, "h w c"]]  # by (round, index): those that a share may show
    scores: Float[np.ndarray, "rounds num"]
    labels: Int[np.ndarray, " num"] | None
    seeds: list[int]  # of the rounds: `sample.py --seed=... --num=...` draws each again
    about: dict[str, Any]  # what `draw` tells of the first round


def num_rounds(share: float, num: int, wanted: int | None = None) -> int:
    """How many candidates a place needs for one of them to be the best `share`: 1 / share, rounded up.

    `wanted` asks for at least so many candidates for all `num` places together, so that a share is told from a larger
    pool; InputError where they are fewer than the places need.
    """
    least = math.ceil(1.0 / share - 1e-9)  # less what division may have added
    if wanted is None:
        return least
    if wanted < least * num:
        raise InputError(
            f"--candidates={wanted} is too few: to keep the best {share:g} of them {num} images need {least * num}"
        )
    return -(-wanted // num)


def candidates(
    draw: Callable[..., tuple[np.ndarray, dict[str, Any]]],
    scorer: Scorer,
    seed: int,
    num: int,
    rounds: int,
    shares: Sequence[float],
    options: dict[str, Any],
    progress: Callable[[int], None] = lambda done: None,
) -> Candidates:
    """Draws num samples in each of the rounds, and scores them; keeps the images that one of the shares may show.

    Rounds, because classes come in turn: one draw of 320 samples of 1,000 classes would leave nothing to choose from
    within a class. The classes are those that `draw` reports as `labels`. Raises InputError where the scorer fails, or
    returns anything but one finite number an image.
    """
    # Not seed + round: two runs of neighbouring seeds would have nearly all candidates in common.
    seeds = [seed, *(zlib.crc32(f"{seed}/{index}".encode()) >> 1 for index in range(1, rounds))]
    images, scores, labels, first = {}, [], None, {}
    for index, of_round in enumerate(seeds):
        drawn, about = draw(jax.random.key(of_round), num, **options)
        if index == 0:
            labels = np.asarray(about["labels"], np.int32) if "labels" in about else None
            first = about
        scores.append(score(scorer, drawn, labels))
        images |= {(index, place): drawn[place] for place in range(num)}
        may = _may_be_shown(np.stack(scores), labels, rounds, shares)
        images = {place: image for place, image in images.items() if may[place]}
        progress((index + 1) * num)
    return Candidates(images, np.stack(scores), labels, seeds, first)


def _may_be_shown(
    scores: Float[np.ndarray, "r num"], labels: Int[np.ndarray, " num"] | None, rounds: int, shares: Sequence[float]
) -> Bool[np.ndarray, "r num"]:
    """Of the candidates so far, those that are not yet beaten by as many of their class as the shares keep of it.

    What is beaten stays beaten. The share 1 shows the first round.
    """
    of_candidate, flat = _classes(labels, scores.shape), scores.ravel()
    may = np.zeros(flat.size, bool)
    for label in np.unique(of_candidate):
        (members,) = np.nonzero(of_candidate == label)
        total = len(members) // len(scores) * rounds
        limit = max((round(share * total) for share in shares if share < 1), default=0)
        may[members[np.argsort(-flat[members], kind="stable")[:limit]]] = True
    may = may.reshape(scores.shape)
    may[0] |= 1.0 in shares
    return may


def draw_best(
    draw: Callable[..., tuple[np.ndarray, dict[str, Any]]],
    scorer: Scorer,
    seed: int,
    num: int,
    shares: Sequence[float],
    wanted: int | None,
    options: dict[str, Any],
    stream: TextIO,
) -> tuple[np.ndarray, dict[str, Any], dict[str, np.ndarray], dict[str, Any]]:
    """Samples of the smallest share, what is to be known of a round, a grid by name for each share, `record`."""
    rounds = num_rounds(shares[-1], num, wanted)
    progress = metrics.counting("candidates", rounds * num, stream)
    drawn = candidates(draw, scorer, seed, num, rounds, shares, options, progress)
    grids = {f"samples_top_{share:g}": best(drawn, share) for share in shares}
    about = {"accept_top": shares, "candidates": rounds * num}
    return grids[f"samples_top_{shares[-1]:g}"], about | drawn.about, grids, record(drawn, shares)


def score(
    scorer: Scorer, images: UInt8[np.ndarray, "n h w c"], labels: Int[np.ndarray, " n"] | None
) -> Float[np.ndarray, " n"]:
    """The scorer's values, checked."""
    values = flag_values.call("scorer", scorer, images, labels)
    if values.shape != (len(images),):
        raise InputError(
            f"the function of --scorer must return one score an image, [{len(images)}], not {values.shape}"
        )
    return values


def kept(drawn: Candidates, share: float) -> Bool[np.ndarray, "rounds num"]:
    """Which candidates belong to the best `share` of their class, round(share n) of its n; of equal scores the earlier.

    Without classes all candidates are one.
    """
    of_candidate, scores = _classes(drawn.labels, drawn.scores.shape), drawn.scores.ravel()
    is_kept = np.zeros(scores.size, bool)
    for label in np.unique(of_candidate):
        (members,) = np.nonzero(of_candidate == label)
        best = np.argsort(-scores[members], kind="stable")[: round(share * len(members))]
        is_kept[members[best]] = True
    return is_kept.reshape(drawn.scores.shape)


def places(drawn: Candidates, is_kept: Bool[np.ndarray, "rounds num"]) -> Int[np.ndarray, "num 2"]:
    """(round, index) of the kept candidate that stands in each place: of its class, in the order of drawing.

    Not the best first, so that a grid is a fair picture of its share: that of the share 1 holds the first round as it
    was drawn, that of the smallest share all that is kept of it, where there are no more candidates than it needs.
    """
    num, classes = drawn.scores.shape[1], _classes(drawn.labels, drawn.scores.shape)
    of_candidate = np.where(is_kept.ravel(), classes, -1)
    chosen = np.empty(num, np.int64)
    for label in np.unique(of_candidate[of_candidate >= 0]):
        (here,) = np.nonzero(classes[:num] == label)
        chosen[here] = np.nonzero(of_candidate == label)[0][: len(here)]
    return np.stack(np.divmod(chosen, num), axis=-1)


def best(drawn: Candidates, share: float) -> UInt8[np.ndarray, "num h w c"]:
    """The images in the `places` of a share."""
    return np.stack([drawn.images[place, index] for place, index in places(drawn, kept(drawn, share)).tolist()])


def record(drawn: Candidates, shares: Sequence[float]) -> dict[str, Any]:
    """Seeds, labels and scores of all candidates, and for every share what of them its grid shows."""
    about: dict[str, Any] = {"seeds": drawn.seeds, "labels": None if drawn.labels is None else drawn.labels.tolist()}
    about["shares"] = []
    for share in shares:
        is_kept = kept(drawn, share)
        about["shares"].append(
            {
                "share": share,
                "kept": int(is_kept.sum()),
                "mean_score": float(drawn.scores[is_kept].mean()),
                "shown_as_round_and_index": places(drawn, is_kept).tolist(),
            }
        )
    return about | {"scores_by_round": drawn.scores.tolist()}


def _classes(labels: Int[np.ndarray, " num"] | None, shape: tuple[int, ...]) -> Int[np.ndarray, " rounds*num"]:
    rounds, num = shape
    return np.tile(np.zeros(num, np.int32) if labels is None else labels, rounds)
