"""The loss law against published runs, the discount for repeated tokens, and the bands of scores."""

from __future__ import annotations

import math

import pytest

from cost.outcome.scaling_law import (
    CHINCHILLA,
    effective_tokens,
    fit_compute_optimal,
    fit_offset,
    law_for,
    laws,
    loss_points,
    predict,
)
from cost.outcome.scores import core_band, hellaswag_band, published_scores
from cost.plan.frontier import model_shape


def test_the_law_by_hand() -> None:
    # N = D = 1e10: 482.01 / 10^3.478 + 2085.43 / 10^3.658 + 1.8172.
    by_hand = 482.01 / 3006.1 + 2085.43 / 4549.9 + 1.8172
    assert CHINCHILLA.nats_per_token(1e10, 1e10) == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.parametrize(("flops", "bits_per_byte"), [(2e18, 0.8616), (1e19, 0.7999)])
def test_two_isoflop_points_predict_the_others(flops: float, bits_per_byte: float) -> None:
    """nanochat's dev/LOG.md, 2026-01-27: fitted at 1e18 and 5e18, judged inside and outside of that."""
    points = [point for point in loss_points() if point.corpus == "fineweb-edu"]
    assert [point.flops for point in points] == [1e18, 5e18]
    law = fit_compute_optimal(points)
    nats = law.nats_per_token(*law.optimum(flops))
    assert law.bits_per_byte(nats) == pytest.approx(bits_per_byte, abs=0.01)


def test_the_fitted_optimum_trains_on_ten_to_eleven_tokens_per_weight() -> None:
    for flops in (1e18, 5e18, 1e19):
        num_params, num_tokens = laws()["fineweb-edu/nanochat"].optimum(flops)
        assert 10 < num_tokens / num_params < 11.5


def test_the_optimum_is_one() -> None:
    num_params, num_tokens = CHINCHILLA.optimum(1e20)
    assert 6 * num_params * num_tokens == pytest.approx(1e20)
    best = CHINCHILLA.nats_per_token(num_params, num_tokens)
    for factor in (0.8, 1.25):
        assert CHINCHILLA.nats_per_token(num_params * factor, num_tokens / factor) > best


def test_a_later_run_on_the_same_corpus_lies_in_the_interval() -> None:
    """nanochat's d24 of 2026-01-29: 24 x 12 x 1536^2 + 32768 x 1536 matrix weights, 8.76e9 tokens, 0.748 bpb."""
    matrices = 24 * 12 * 1536**2 + 32768 * 1536
    found = laws()["fineweb-edu/nanochat"].predict(matrices, 8_757_706_752)
    assert found.low_bits_per_byte is not None
    assert found.high_bits_per_byte is not None
    assert found.low_bits_per_byte < 0.74833 < found.high_bits_per_byte


def test_offsets_by_corpus_are_the_known_ones() -> None:
    assert laws()["fineweb/adamw"].irreducible - CHINCHILLA.irreducible == pytest.approx(0.28, abs=0.03)
    first = next(point for point in loss_points() if point.point_id == "cerebras-111M")
    assert fit_offset([first]).irreducible - CHINCHILLA.irreducible == pytest.approx(-0.81, abs=0.01)


def test_data_efficiency_reaches_the_points_it_was_fitted_to() -> None:
    # llm.c needs 10.26e9 tokens for 3.272 where Muon needs 3.25e9 for 3.279 and the speedrun 2.40e9 for 3.276.
    assert 2.9 < law_for("fineweb", "muon").data_efficiency < 3.2
    assert 4.0 < law_for("fineweb", "speedrun").data_efficiency < 4.4
    point = next(point for point in loss_points() if point.point_id == "modded-04-muon")
    law = law_for("fineweb", "muon")
    assert law.nats_per_token(point.matrix_params, point.num_tokens) == pytest.approx(3.2785, abs=1e-6)


def test_an_unknown_corpus_is_the_unshifted_law_with_a_wide_interval() -> None:
    unknown, known = law_for("my own diary", "muon"), law_for("fineweb", "muon")
    assert unknown.irreducible == CHINCHILLA.irreducible
    assert unknown.data_efficiency == known.data_efficiency
    assert unknown.sigma_nats > 3 * known.sigma_nats
    # The interval spans the known corpora: +0.28 and -0.81 around the law.
    found = CHINCHILLA.predict(1e9, 2e10)
    assert found.high_nats - found.nats_per_token > 0.28
    assert found.bits_per_byte is None


def test_repeated_tokens_count_less_and_four_epochs_still_count() -> None:
    assert effective_tokens(5.0, 10.0) == 5.0
    assert effective_tokens(10.0, 10.0) == 10.0
    # Muennighoff et al. 2023: 4 epochs are nearly as good as new data, 40 are not.
    assert effective_tokens(40.0, 10.0) == pytest.approx(10 * (1 + 15.39 * (1 - math.exp(-3 / 15.39))))
    assert effective_tokens(40.0, 10.0) > 0.9 * 40
    assert effective_tokens(400.0, 10.0) < 0.4 * 400
    assert CHINCHILLA.predict(1e8, 1e10, 1e9).nats_per_token > CHINCHILLA.predict(1e8, 1e10).nats_per_token


def test_a_mixture_lies_between_its_active_and_its_total_weights() -> None:
    work = model_shape(1e9, num_experts=8, num_active_experts=2)
    found = predict(work, CHINCHILLA)
    total = CHINCHILLA.nats_per_token(work.matrix_params, work.num_tokens)
    active = CHINCHILLA.nats_per_token(work.active_matrix_params, work.num_tokens)
    assert total < found.nats_per_token < active
    assert found.low_nats < total < active < found.high_nats


def test_bits_per_byte_and_nats_round_trip() -> None:
    law = laws()["fineweb/adamw"]
    assert law.bytes_per_token is not None
    bits = law.bits_per_byte(3.0)
    assert bits is not None
    assert bits * math.log(2) * law.bytes_per_token == pytest.approx(3.0)


def test_hellaswag_is_a_band_of_near_runs_or_unknown() -> None:
    # 1.3e9 parameters x 1.2e10 tokens: near the naive 1B (28.8 %) and llmq's 1.5B (53.0 %), far from the rest.
    near = hellaswag_band(model_shape(1.3e9, tokens_per_param=9.2), None)
    assert near.num_rows == 2
    assert near.low == pytest.approx(0.288 - 1.96 * math.sqrt(0.288 * 0.712 / 10042), abs=1e-4)
    assert near.high == pytest.approx(0.530 + 1.96 * math.sqrt(0.530 * 0.470 / 10042), abs=1e-4)
    far = hellaswag_band(model_shape(1e7), None)
    assert (far.known, far.low, far.num_rows) == (False, None, 0)
    assert "no published run has between 1/4 and 4 times its compute" in far.basis


def test_core_is_known_only_between_its_rows() -> None:
    law = law_for("fineweb-edu", "nanochat")
    inside = core_band(law.predict(24 * 12 * 1536**2 + 32768 * 1536, 8_757_706_752), "fineweb-edu")
    assert inside.low is not None
    assert inside.high is not None
    assert inside.low < 0.2585 < inside.high
    assert inside.num_rows == 3
    assert not core_band(law.predict(1e7, 1e9), "fineweb-edu").known
    assert core_band(CHINCHILLA.predict(1e9, 1e10), "fineweb-edu").basis.startswith("bits per byte are unknown")
    assert core_band(law.predict(1e9, 1e10), None).basis == "no published run on an unknown corpus"


def test_every_published_score_has_a_source() -> None:
    assert all(row.source and 0 < row.score < 1 for row in published_scores())
