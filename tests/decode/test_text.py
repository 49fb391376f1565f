"""Prompts in, texts out: buckets, truncation, stop strings, order, on toy and real models."""

import dataclasses

import jax
import numpy as np
import pytest
from toy_model import ToyModel, toy_params

from chatyuan.decode import DecodeConfig, TextConfig, TextGenerator
from chatyuan.decode.stopping import cut_at_stop
from chatyuan.decode.text import encode_prompt, length_batches
from chatyuan.errors import UserError
from chatyuan.models import ModelConfig, build

LETTERS = "用户小元：\nabcdefgh"


@dataclasses.dataclass(frozen=True)
class LetterVocabulary:
    """One id a letter after pad, eos and unk; then two sentinels."""

    size: int = 3 + len(LETTERS) + 2
    pad_id: int = 0
    eos_id: int = 1
    sentinel_ids: tuple[int, ...] = (3 + len(LETTERS), 4 + len(LETTERS))

    def encode(self, text):
        return [3 + LETTERS.index(letter) if letter in LETTERS else 2 for letter in text]

    def decode(self, ids):
        return "".join(LETTERS[i - 3] if 3 <= i < 3 + len(LETTERS) else "" for i in ids)


VOCABULARY = LetterVocabulary()
STEPS = 8
SHORT = TextConfig(input_lengths=(4, 8), batch_sizes=(1, 2, 4))
PROMPTS = ["abc", "ab", "hgfedcb", "d", "abcd", "用户：小元：abcd", "c", "cc", "ccc"]


@pytest.fixture(scope="module")
def params():
    # Two rows more than the vocabulary: the padding of an embedding, and tempting.
    params = toy_params(VOCABULARY.size + 2, STEPS, seed=3)
    params["step"] = params["step"].at[:, VOCABULARY.size :].add(5.0)
    return params


@pytest.fixture(scope="module")
def greedy():
    return TextGenerator(ToyModel(), VOCABULARY, DecodeConfig(max_decode_length=STEPS), SHORT)


def test_results_keep_their_order_and_do_not_depend_on_the_batch(params, greedy):
    whole = greedy.generate(params, PROMPTS)
    for result, prompt in zip(whole, PROMPTS, strict=True):
        alone = greedy.generate(params, [prompt])[0]
        # The shape of a batch decides the order of a sum, hence the last bit of a score.
        assert alone.scores == pytest.approx(result.scores, rel=1e-5)
        assert dataclasses.replace(alone, scores=result.scores) == result
    for prompt, result in zip(PROMPTS, whole, strict=True):
        ids, lost = encode_prompt(VOCABULARY, SHORT, prompt)
        assert (result.prompt_tokens, result.truncated_tokens) == (len(ids), lost)
        assert max(result.token_ids[0]) < VOCABULARY.size and 0 not in result.token_ids[0]
        assert result.finished[0] == (result.token_ids[0][-1] == 1)
        assert result.text == VOCABULARY.decode(result.token_ids[0])
    assert len({result.text for result in whole}) > 3


def test_compilations_are_bounded(params, greedy):
    rng = np.random.default_rng(0)
    for _ in range(40):
        lengths = rng.integers(0, 12, size=rng.integers(1, 7))
        greedy.generate(params, ["".join(rng.choice(list("abcdefgh"), n)) for n in lengths])
    assert greedy.num_compiled() <= 2 * 3
    assert greedy.generate(params, []) == []


def test_seeds_make_samples(params):
    config = DecodeConfig(method="sample", max_decode_length=STEPS, num_samples=2)
    generator = TextGenerator(ToyModel(), VOCABULARY, config, SHORT)
    counted = generator.generate(params, ["abc", "abc", "d"], 7)
    assert len(counted[0].texts) == len(counted[0].scores) == 2
    assert counted[0].texts != counted[1].texts
    assert generator.generate(params, ["d", "abc"], [9, 7]) == [counted[2], counted[0]]
    with pytest.raises(UserError, match="2 seeds for 1 prompts"):
        generator.generate(params, ["abc"], [1, 2])


def test_stop_strings_cut(params, greedy):
    plain = greedy.generate(params, PROMPTS)
    text = next(result.text for result in plain if len(result.text) > 3)
    stop = text[2]
    config = dataclasses.replace(SHORT, stop=(stop, "zzz"))
    cut = TextGenerator(ToyModel(), VOCABULARY, DecodeConfig(max_decode_length=STEPS), config)
    for before, after in zip(plain, cut.generate(params, PROMPTS), strict=True):
        assert after.text == before.text.split(stop)[0]
        assert after.finished == [before.finished[0] or stop in before.text]
    assert cut_at_stop("abcd", ["d", "bc"]) == ("a", True)
    assert cut_at_stop("abcd", []) == ("abcd", False)


def test_sentinels_can_be_forbidden(params):
    params = {**params, "step": params["step"].at[:, VOCABULARY.sentinel_ids[0]].add(9.0)}
    decode_config = DecodeConfig(max_decode_length=STEPS)
    free = TextGenerator(ToyModel(), VOCABULARY, decode_config, SHORT)
    config = dataclasses.replace(SHORT, suppress_sentinels=True)
    bound = TextGenerator(ToyModel(), VOCABULARY, decode_config, config)
    sentinels = set(VOCABULARY.sentinel_ids)
    assert sentinels & set(free.generate(params, ["abc"])[0].token_ids[0])
    assert not sentinels & set(bound.generate(params, ["abc"])[0].token_ids[0])


@pytest.mark.parametrize(
    "truncation,expected",
    [("left", "：cd\n小元："), ("right", "用户：ab\n小"), ("turns", "：cd\n小元：")],
)
def test_truncation(truncation, expected):
    config = TextConfig(input_lengths=(8,), truncation=truncation)
    prompt = "用户：ab\n小元：a\n用户：cd\n小元："
    ids, lost = encode_prompt(VOCABULARY, config, prompt)
    assert ids[-1] == 1 and VOCABULARY.decode(ids) == expected
    assert lost == len(prompt) - 7


def test_turns_are_dropped_whole():
    prompt = "用户：ab\n小元：a\n用户：cd\n小元：d\n用户：e\n小元："
    config = TextConfig(input_lengths=(23,))
    ids, lost = encode_prompt(VOCABULARY, config, prompt)
    assert VOCABULARY.decode(ids) == "用户：cd\n小元：d\n用户：e\n小元："
    assert lost == len("用户：ab\n小元：a\n")
    assert encode_prompt(VOCABULARY, TextConfig(append_eos=False), "") == ([1], 0)


def test_batches_hold_every_row_once():
    lengths = np.random.default_rng(1).integers(1, 9, size=37).tolist()
    seen = []
    for rows, bucket, size in length_batches(SHORT, lengths):
        assert len(rows) <= size and size in SHORT.batch_sizes
        assert all(lengths[row] <= bucket for row in rows)
        assert bucket == 4 or max(lengths[row] for row in rows) > 4
        seen += rows
    assert sorted(seen) == list(range(37))


@pytest.mark.parametrize("architecture", ["encoder_decoder", "prefix_lm"])
def test_greedy_is_identical_at_batch_1_8_32(architecture):
    config = ModelConfig(
        architecture=architecture, vocab_size=32, embed_dim=32, mlp_dim=48, num_heads=2,
        head_dim=16, num_encoder_layers=2, num_decoder_layers=2,
    )  # fmt: skip
    model = build(config)
    params = jax.jit(model.init)(jax.random.key(1))
    rng = np.random.default_rng(2)
    prompts = ["".join(rng.choice(list("abcdefgh"), n)) for n in rng.integers(1, 15, size=32)]
    found = []
    for size in (1, 8, 32):
        text_config = TextConfig(input_lengths=(16,), batch_sizes=(size,))
        decode_config = DecodeConfig(max_decode_length=STEPS, repetition_penalty=1.2)
        generator = TextGenerator(model, VOCABULARY, decode_config, text_config)
        found.append([result.token_ids for result in generator.generate(params, prompts)])
        assert generator.num_compiled() == 1
    assert found[0] == found[1] == found[2]
    assert len({str(ids) for ids in found[0]}) > 8


@pytest.mark.parametrize(
    "values,words",
    [
        ({"input_lengths": ()}, "input_lengths"),
        ({"batch_sizes": (0, 4)}, "batch_sizes"),
        ({"input_lengths": (1, 8)}, "at least 2"),
        ({"truncation": "lefts"}, "Did you mean left"),
    ],
)
def test_bad_configuration(values, words):
    with pytest.raises(UserError, match=words):
        TextConfig(**values)
