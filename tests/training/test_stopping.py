"""Early stopping: what is better, when it ends, and what is kept."""

import pytest

from jaxtune.config import resolve
from jaxtune.errors import JaxtuneError
from jaxtune.training.loop.early_stopping import Tally, check_metric, consider


def outcomes(values, metric="loss", **settings):
    """Returns the best step, and the evaluation that stopped the run if one did."""
    section = resolve({"evaluation": {"stop_metric": metric} | settings}).evaluation
    tally = Tally()
    for number, value in enumerate(values, start=1):
        consider(tally, number, {metric: value}, section)
        if tally.stopped:
            return tally.best_step, number
    return tally.best_step, None


def test_patience_counts_evaluations_without_a_better_score():
    falling_then_rising = [3.0, 2.0, 2.5, 1.5, 1.6, 1.5, 1.7]
    assert outcomes(falling_then_rising, stop_patience=3) == (4, 7)
    assert outcomes(falling_then_rising, stop_patience=4) == (4, None)
    assert outcomes(falling_then_rising) == (4, None)


def test_a_change_that_is_too_small_is_not_better():
    assert outcomes([3.0, 2.95, 2.9, 2.89], stop_patience=3, stop_min_change=0.2) == (1, 4)
    assert outcomes([3.0, 2.95, 2.7], stop_patience=3, stop_min_change=0.2) == (3, None)


@pytest.mark.parametrize("metric", ["token_accuracy", "exact_match", "law/exact_match"])
def test_of_some_scores_more_is_better(metric):
    assert outcomes([0.1, 0.5, 0.4, 0.3], metric, stop_patience=2) == (2, 4)


def test_a_score_that_nothing_gives_is_named_with_the_closest():
    names = ["loss", "perplexity", "token_accuracy", "law/loss", "tokens"]
    with pytest.raises(JaxtuneError, match=r'"los" is not a metric.*did you mean "loss"'):
        check_metric("los", names)
    with pytest.raises(JaxtuneError, match=r"it needs evaluation\.generate"):
        check_metric("exact_match", names)
    with pytest.raises(JaxtuneError, match='"tokens" is not a metric'):
        check_metric("tokens", names)  # there is no better and worse of it
