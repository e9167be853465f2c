"""A misspelt name is answered with the most similar one that exists."""

from __future__ import annotations

from cost.spelling import closest, did_you_mean


def test_the_most_similar_name_is_suggested() -> None:
    assert closest("hundrad", ["tiny", "hundred"]) == "hundred"
    assert did_you_mean("hundrad", {"tiny": 1, "hundred": 2}) == "; did you mean hundred?"


def test_a_name_that_is_like_no_other_gets_no_suggestion() -> None:
    assert closest("x", ["tiny", "hundred"]) is None
    assert did_you_mean("x", []) == ""
    assert did_you_mean("hudrde", ["hundred"], cutoff=0.95) == ""
