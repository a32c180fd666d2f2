from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_cgn.errors import ConfigError
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.vocabulary.cost import TrainingShape, model_cost
from megatron_cgn.vocabulary.recommend import (
    Candidate,
    Policy,
    candidates,
    recommend,
    size_between,
)
from megatron_cgn.vocabulary.settings import Settings
from megatron_cgn.vocabulary.sweep import ALL, Agreement, Sweep, SweepPoint, TextFigures
from megatron_cgn.vocabulary.worth import policy_of
from tokenizer.extension import Extension, NewToken, Origin

LLAMA_3_8B = Architecture(
    family="llama",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128_256,
    max_position_embeddings=8192,
    norm_eps=1e-5,
    rope_theta=500_000.0,
    rope_scaling=None,
    tie_word_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
    initializer_range=0.02,
)
AT_8K = TrainingShape(seq_length=8192)


def test_flops_are_those_published_for_llama_3_8b() -> None:
    """51.47 GFLOP a token at 8,192 in Megatron's convention: 45.03 in matrices, 6.44 attention."""
    cost = model_cost(LLAMA_3_8B, num_tokens=0, old_vocab_size=128_256, shape=AT_8K)
    assert cost.training_flops_per_token / 1e9 == pytest.approx(51.47, abs=0.005)
    assert cost.parameters == 8_030_261_248
    assert cost.extra_parameters == 0
    # 8 heads of 128 keys and as many values, in 32 layers, of two bytes each.
    assert cost.kv_cache_bytes_per_token == 131_072


def test_rows_cost_parameters_flops_and_memory() -> None:
    before = model_cost(LLAMA_3_8B, num_tokens=0, old_vocab_size=128_256, shape=AT_8K)
    after = model_cost(LLAMA_3_8B, num_tokens=1000, old_vocab_size=128_256, shape=AT_8K)
    # 129,256 ids in multiples of 128: 1,024 rows more, in two matrices.
    assert after.rows == 129_280
    assert after.extra_parameters == 2 * 1024 * 4096
    more = after.training_flops_per_token - before.training_flops_per_token
    assert more == 6 * 1024 * 4096
    assert after.training_state_bytes - before.training_state_bytes == 18 * 2 * 1024 * 4096
    assert after.logits_bytes - before.logits_bytes == 8192 * 1024 * 6


def test_tied_rows_are_counted_once_and_padding_follows_tensor_parallelism() -> None:
    tied = replace(LLAMA_3_8B, tie_word_embeddings=True)
    shape = TrainingShape(seq_length=2048, micro_batch_size=3, tensor_model_parallel_size=8)
    before = model_cost(tied, num_tokens=0, old_vocab_size=128_256, shape=shape)
    after = model_cost(tied, num_tokens=1, old_vocab_size=128_256, shape=shape)
    # 128,256 is no multiple of 1,024: the next are 129,024 and, for one id more, the same.
    assert (before.rows, after.rows) == (129_024, 129_024)
    assert after.extra_parameters == 0
    assert before.logits_bytes == 3 * 2048 * (129_024 // 8) * 6
    further = model_cost(tied, num_tokens=1000, old_vocab_size=128_256, shape=shape)
    assert further.extra_parameters == 1024 * 4096


def test_new_tokens_take_the_rows_that_a_model_has_to_spare() -> None:
    """Qwen 3 has 151,936 rows and 151,669 ids."""
    qwen = replace(LLAMA_3_8B, vocab_size=151_936)
    free = model_cost(qwen, num_tokens=250, old_vocab_size=151_669, shape=AT_8K)
    assert (free.rows, free.extra_parameters) == (151_936, 0)
    more = model_cost(qwen, num_tokens=268, old_vocab_size=151_669, shape=AT_8K)
    assert (more.rows, more.extra_parameters) == (152_064, 2 * 128 * 4096)


def test_wrong_shapes_are_named_together() -> None:
    with pytest.raises(ConfigError, match=r"(?s)seq_length: 0.*micro_batch_size: -1"):
        TrainingShape(seq_length=0, micro_batch_size=-1)


def candidate(
    num_tokens: int, gain: float, *, seen: float | None = 1.0, growth: float = 0.0
) -> Candidate:
    return Candidate(num_tokens=num_tokens, gain=gain, share_seen=seen, general_growth=growth)


def chosen(*found: Candidate, policy: Policy | None = None) -> tuple[int, str]:
    result = recommend(
        [candidate(0, 0.0, seen=None), *found],
        policy=policy or Policy(),
        basis="training FLOPs",
    )
    return result.num_tokens, result.reason


def test_the_last_step_that_pays_is_taken() -> None:
    # From 2,000 to 5,000: 0.9 % over 3,000 tokens are 0.3 % for each 1,000; then 0.2 %.
    number, reason = chosen(
        candidate(1000, 0.100), candidate(2000, 0.110), candidate(5000, 0.119),
        candidate(10_000, 0.129),
    )  # fmt: skip
    assert number == 5000
    assert "5,000 new tokens save 11.9% of the training FLOPs" in reason
    assert "0.20%, less than 0.25%" in reason


def test_a_step_is_measured_from_the_last_size_taken() -> None:
    # 2,000 adds 0.2 % to 1,000 and is passed over; 3,000 adds 0.8 % over 2,000 tokens.
    assert chosen(candidate(1000, 0.1), candidate(2000, 0.102), candidate(3000, 0.108))[0] == 3000


def test_the_largest_size_tried_is_no_proof_that_more_would_not_pay() -> None:
    number, reason = chosen(candidate(1000, 0.1), candidate(2000, 0.2))
    assert number == 2000
    assert "no more than 2,000 were tried" in reason


def test_tokens_that_are_met_too_rarely_are_not_taken() -> None:
    number, reason = chosen(candidate(1000, 0.1, seen=0.95), candidate(2000, 0.2, seen=0.94))
    assert number == 1000
    assert "would meet 95.0% of them 100 times or more; with 2,000, training on" in reason
    assert (
        "the corpus once would meet only 94.0% of its tokens 100 times or more, not 95%" in reason
    )
    number, reason = chosen(candidate(1000, 0.1, seen=0.5))
    assert number == 0
    assert reason.startswith(
        "No extension: 1,000 new tokens, the fewest that were tried, would save"
    )
    assert "save 10.0% of the training FLOPs, but training on the corpus once would" in reason
    assert "meet only 50.0%" in reason


def test_a_small_gain_is_not_worth_a_changed_vocabulary() -> None:
    assert chosen(candidate(1000, 0.03))[0] == 1000
    number, reason = chosen(candidate(1000, 0.029))
    assert number == 0
    assert "saves only 2.9% of the training FLOPs, less than the 3.0%" in reason
    _, reason = chosen(candidate(1000, 0.029), candidate(2000, 0.1, seen=0.9))
    assert "only 2.9%" in reason and "with 2,000, training on" in reason
    assert chosen(candidate(1000, 0.029), policy=Policy(min_gain=0.02))[0] == 1000


def test_no_size_may_make_general_text_longer() -> None:
    number, reason = chosen(candidate(1000, 0.1, growth=0.001), candidate(2000, 0.15))
    assert number == 2000
    assert (
        "general text would take 0.10% more tokens" in chosen(candidate(1000, 0.1, growth=0.001))[1]
    )


def test_a_growing_cost_is_refused() -> None:
    found = chosen(candidate(1000, -0.01), candidate(2000, -0.02))
    assert found == (0, "No extension: 1,000 new tokens save none of the training FLOPs.")


def test_nothing_tried_is_nothing_recommended() -> None:
    assert chosen() == (0, "No extension: no size was tried.")


def test_unknown_uses_are_said_to_be_unknown() -> None:
    number, reason = chosen(candidate(1000, 0.1, seen=None))
    assert number == 1000
    assert "how often training would meet them is not known" in reason


def figures(tokens: int) -> dict[str, TextFigures]:
    return {ALL: TextFigures(documents=1, characters=500, text_bytes=1000, tokens=tokens)}


def point(
    size: int, domain: int, general: int | None, uses: tuple[float, ...] | None = None
) -> SweepPoint:
    return SweepPoint(
        num_tokens=size,
        vocab_size=1000 + size,
        domain=figures(domain),
        general={} if general is None else figures(general),
        uses=np.zeros(size, dtype=np.int64),
        corpus_uses=None if uses is None else np.array(uses),
    )


def made(*points: SweepPoint, corpus_bytes: int | None = None) -> Sweep:
    agreement = Agreement(num_tokens=0, documents=0, differing=0, lossy=0)
    return Sweep(points=points, agreement=agreement, corpus_bytes=corpus_bytes)


def extension_of(*origins: Origin) -> Extension:
    tokens = [
        NewToken(
            id=1000 + place, token=str(place), text=str(place), old_ids=(0, 1),
            frequency=1, spread=1, origin=origin,
        )
        for place, origin in enumerate(origins)
    ]  # fmt: skip
    return Extension(
        old_vocab_size=1000, new_tokens=tuple(tokens), old_fingerprint="", new_fingerprint=""
    )


def test_gain_is_that_of_the_mix() -> None:
    found = candidates(
        made(point(0, 400, 200), point(2, 300, 190)),
        extension=extension_of("corpus", "corpus"),
        costs=None,
        policy=Policy(domain_share=0.75),
    )
    # 0.75 · 400 + 0.25 · 200 = 350 tokens of 1,000 bytes; then 225 + 47.5.
    assert found[1].gain == pytest.approx(1 - 272.5 / 350)
    assert found[1].general_growth == pytest.approx(-0.05)
    assert found[1].share_seen is None


def test_unknown_general_text_gains_nothing() -> None:
    found = candidates(
        made(point(0, 400, None), point(1, 300, None)),
        extension=extension_of("corpus"),
        costs=None,
        policy=Policy(domain_share=0.75),
    )
    assert found[1].gain == pytest.approx(0.75 * 0.25)


def test_the_larger_output_matrix_is_set_against_the_gain() -> None:
    shape = TrainingShape(seq_length=8192)
    made_of_corpus: list[Origin] = ["corpus"] * 10_000
    costs = [
        model_cost(LLAMA_3_8B, num_tokens=size, old_vocab_size=128_256, shape=shape)
        for size in (0, 10_000)
    ]
    found = candidates(
        made(point(0, 400, 200), point(10_000, 400, 200)),
        extension=extension_of(*made_of_corpus),
        costs=costs,
        policy=Policy(),
    )
    # No token is saved, and 10,112 rows more are multiplied.
    expected = -6 * 10_112 * 4096 / costs[0].training_flops_per_token
    assert found[1].gain == pytest.approx(expected)


def test_uses_are_scaled_to_the_domain_text_that_is_planned() -> None:
    sweep = made(point(0, 400, None), point(3, 300, None, uses=(0.0, 10.0, 9.0)), corpus_bytes=1000)
    extension = extension_of("term", "corpus", "corpus")

    def seen(planned: int | None) -> float | None:
        policy = Policy(planned_bytes=planned, domain_share=0.8)
        return candidates(sweep, extension=extension, costs=None, policy=policy)[1].share_seen

    # 80 % of 12,500 bytes are ten times the corpus: 100 and 90 uses. The term does not count.
    assert seen(12_500) == 0.5
    assert seen(20_000) == 1.0
    assert seen(None) == 0.0


def test_a_size_between_two_has_what_the_larger_one_lacks() -> None:
    # A term, 299 tokens that are met, 10 that are not, 80 that are, and none from there on.
    uses = (100.0,) * 300 + (0.0,) * 10 + (100.0,) * 80 + (0.0,) * 200
    extension = extension_of("term", *(["corpus"] * 589))
    points = [point(n, 400 - n // 5, None, uses=uses[:n] or None) for n in (0, 50, 450, 590)]

    def between(points: list[SweepPoint], **policy: int) -> int | None:
        return size_between(points, extension=extension, corpus_bytes=1000, policy=Policy(**policy))

    # The term is not judged: 379 of 398 are 95.2 %, 379 of 399 are not enough. 399 is rounded.
    assert between([points[0], points[1], points[3]]) == 390
    assert between([points[0], points[3]]) == 390
    assert between(points) == 390
    assert between(points[:2]) is None  # every size has it
    assert between([points[0], points[2]], min_uses=101) is None
    few = [points[0], point(590, 300, None, uses=(100.0,) * 90 + (0.0,) * 500)]
    assert between(few) is None  # 94 tokens are not worth a look
    beyond = [points[0], point(395, 310, None, uses=uses[:300] + (100.0,) * 95), points[3]]
    assert between(beyond) is None  # 390 are fewer than 395, which are learnt


def test_training_on_the_corpus_once_is_training_on_what_was_not_counted_too() -> None:
    settings = Settings(model=Path(), corpus=(), output=Path(), domain_share=0.5)
    assert policy_of(settings, counted=1000, corpus=1000) == Policy(domain_share=0.5)
    sweep = made(point(0, 400, None), point(2, 300, None, uses=(10.0, 9.0)), corpus_bytes=1000)
    policy = policy_of(settings, counted=1000, corpus=10_000)
    extension = extension_of("corpus", "corpus")
    found = candidates(sweep, extension=extension, costs=None, policy=policy)
    assert found[1].share_seen == 0.5  # 100 and 90 uses
    planned = replace(settings, planned_training_mb=3)
    assert policy_of(planned, counted=1, corpus=2).planned_bytes == 3_000_000


def test_wrong_policies_are_named_together() -> None:
    with pytest.raises(ConfigError, match=r"(?s)min_gain: 3.*planned_bytes: 0"):
        Policy(min_gain=3, planned_bytes=0)
    with pytest.raises(ConfigError, match="domain_share: 0"):
        Policy(domain_share=0)
