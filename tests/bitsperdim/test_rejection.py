"""Rejection against scores whose ranking is known: which candidates are kept, and where they stand."""

import jax
import numpy as np
import pytest

from bitsperdim import rejection
from bitsperdim.errors import InputError

LABELS = [0, 1, 2, 0, 1]
SHARES = (1.0, 0.5, 0.1, 0.05)


def draw(key, n, labels=True):
    """Noise, so that a scorer can look up any ranking."""
    images = np.asarray(jax.random.randint(key, (n, 2, 2, 1), 0, 256)).astype(np.uint8)
    return images, {"network_calls": 7} | ({"labels": LABELS[:n]} if labels else {})


def total(images, labels):
    return images.sum((1, 2, 3), dtype=np.float32)


@pytest.fixture
def drawn():
    return rejection.candidates(draw, total, seed=3, num=5, rounds=20, shares=SHARES, options={})


@pytest.mark.parametrize(("share", "rounds"), [(1.0, 1), (0.5, 2), (0.3, 4), (0.1, 10), (0.07, 15), (0.05, 20)])
def test_a_place_has_as_many_candidates_as_one_of_the_best_share_needs(share, rounds):
    assert rejection.num_rounds(share, 7) == rounds


@pytest.mark.parametrize(("wanted", "rounds"), [(100, 20), (101, 21), (10_000, 2000)])
def test_a_larger_pool_is_drawn_in_whole_rounds(wanted, rounds):
    assert rejection.num_rounds(0.05, 5, wanted) == rounds


def test_a_pool_from_which_the_places_cannot_be_filled_is_refused():
    with pytest.raises(InputError, match=r"--candidates=99 is too few: .* 0\.05 of them 5 images need 100"):
        rejection.num_rounds(0.05, 5, 99)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("shares", [(1.0,), (0.5, 0.05), (1.0, 0.1)])
def test_no_image_is_kept_but_those_that_a_share_may_show(shares, labels):
    sizes = []
    watched = lambda images, of: sizes.append(len(images)) or total(images, of)
    drawn = rejection.candidates(draw, watched, 3, 5, 40, shares, {"labels": labels})
    every = np.zeros(drawn.scores.shape, bool)
    for share in shares:
        every |= rejection.kept(drawn, share) if share < 1 else (np.arange(40) == 0)[:, None]
    assert set(drawn.images) == {tuple(place) for place in np.argwhere(every).tolist()}
    for share in shares:
        places = rejection.places(drawn, rejection.kept(drawn, share))
        again = [draw(jax.random.key(drawn.seeds[r]), 5)[0][i] for r, i in places]
        np.testing.assert_array_equal(rejection.best(drawn, share), again)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.05])
def test_the_best_share_of_every_class_is_kept_and_nothing_else(drawn, share):
    is_kept = rejection.kept(drawn, share)
    for label in set(LABELS):
        places = np.array(LABELS) == label
        scores, taken = drawn.scores[:, places].ravel(), is_kept[:, places].ravel()
        assert taken.sum() == round(share * scores.size)
        assert scores[taken].min() >= scores[~taken].max(initial=-1.0)


def test_classes_do_not_compete_with_each_other(drawn):
    # Class 1 is so much better that without classes nothing else would be left.
    favoured = drawn._replace(scores=drawn.scores + 1e6 * (np.array(LABELS) == 1))
    np.testing.assert_array_equal(rejection.kept(favoured, 0.1), rejection.kept(drawn, 0.1))
    alike = rejection.kept(favoured._replace(labels=None), 0.1)
    assert set(np.nonzero(alike)[1]) <= {1, 4}


@pytest.mark.parametrize("share", [1.0, 0.5, 0.05])
def test_every_place_of_a_grid_holds_a_kept_candidate_of_its_own_class_and_none_twice(drawn, share):
    places, is_kept = rejection.places(drawn, rejection.kept(drawn, share)), rejection.kept(drawn, share)
    assert len({tuple(place) for place in places}) == 5
    assert all(is_kept[tuple(place)] for place in places)
    assert [LABELS[index] for _, index in places] == LABELS


def test_the_grid_of_all_is_the_first_round_and_that_of_the_smallest_share_all_that_is_kept(drawn):
    np.testing.assert_array_equal(rejection.best(drawn, 1.0), draw(jax.random.key(3), 5)[0])
    best = total(rejection.best(drawn, 0.05), None)
    assert sorted(best) == sorted(drawn.scores[rejection.kept(drawn, 0.05)])


def test_equal_scores_keep_the_order_of_drawing(drawn):
    equal = drawn._replace(scores=np.zeros_like(drawn.scores))
    np.testing.assert_array_equal(np.nonzero(rejection.kept(equal, 0.1))[0], np.repeat([0, 1], 5))


def test_every_candidate_can_be_drawn_again_from_the_record(drawn):
    record = rejection.record(drawn, (0.5, 0.05))
    assert len(set(record["seeds"])) == 20
    for share in record["shares"]:
        again = [draw(jax.random.key(record["seeds"][r]), 5)[0][i] for r, i in share["shown_as_round_and_index"]]
        np.testing.assert_array_equal(again, rejection.best(drawn, share["share"]))
    halves, best = record["shares"]
    assert (halves["kept"], best["kept"]) == (50, 5)
    assert best["mean_score"] > halves["mean_score"] > np.mean(record["scores_by_round"])


def test_neighbouring_seeds_have_no_candidates_in_common():
    seeds = [set(rejection.candidates(draw, total, seed, 1, 50, (1.0,), {}).seeds) for seed in (0, 1)]
    assert not seeds[0] & seeds[1]


def test_the_scorer_sees_the_classes_where_there_are_some():
    seen = []
    scorer = lambda images, labels: seen.append(labels) or np.zeros(len(images))
    rejection.candidates(draw, scorer, 0, 5, 2, SHARES, {})
    rejection.candidates(draw, scorer, 0, 5, 1, SHARES, {"labels": False})
    assert [None if labels is None else labels.tolist() for labels in seen] == [LABELS, LABELS, None]


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (lambda images, labels: np.zeros((5, 1)), r"one score an image, \[5\], not \(5, 1\)"),
        (lambda images, labels: np.zeros(4), r"one score an image, \[5\], not \(4,\)"),
        (lambda images, labels: 0.0, r"one score an image, \[5\], not \(\)"),
        (lambda images, labels: np.array([0, 1, np.nan, np.inf, 2]), "2 values that are not finite"),
        (lambda images, labels: ["good"] * 5, "must return numbers"),
        (lambda images, labels: 1 / 0, "failed: ZeroDivisionError"),
        (lambda images: np.zeros(5), "failed: TypeError"),
    ],
)
def test_a_scorer_that_gives_no_scores_is_named(scorer, message):
    with pytest.raises(InputError, match=message):
        rejection.candidates(draw, scorer, 0, 5, 1, SHARES, {})
