"""The draw and its filters against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsalign_jax.config import Sampling
from tsalign_jax.sampling.draw import BLOCK, draw, keep_min_p, keep_top_k, keep_top_p

probabilities = st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=40).map(
  lambda values: np.asarray(values, np.float32) / np.float32(sum(values))
)


def kept(filtered) -> set[int]:
  return set(np.flatnonzero(np.asarray(filtered)).tolist())


@settings(max_examples=60)
@given(probabilities, st.integers(1, 45))
def test_top_k_keeps_the_k_largest_and_what_ties_with_the_last(probs, k):
  floor = np.sort(probs)[::-1][min(k, len(probs)) - 1]
  assert kept(keep_top_k(jnp.asarray(probs)[None], k)[0]) == set(np.flatnonzero(probs >= floor).tolist())


@settings(max_examples=60)
@given(probabilities, st.floats(0.05, 0.99))
def test_top_p_keeps_the_smallest_sufficient_set(probs, p):
  result = kept(keep_top_p(jnp.asarray(probs)[None], p)[0])
  mass = probs[sorted(result)].sum()
  assert mass >= p * probs.sum() - 1e-5
  least = probs[sorted(result)].min()
  assert result == set(np.flatnonzero(probs >= least).tolist())  # a prefix of the sorted order
  without = probs[probs > least].sum()
  assert without < p * probs.sum() + 1e-5  # and no shorter prefix suffices


@settings(max_examples=40)
@given(probabilities, st.floats(0.01, 0.9))
def test_min_p_keeps_what_is_near_the_likeliest(probs, share):
  expected = set(np.flatnonzero(probs >= np.float32(share) * probs.max()).tolist())
  assert kept(keep_min_p(jnp.asarray(probs)[None], share)[0]) == expected


def exact(logits, sampling: Sampling) -> np.ndarray:
  """The distribution to draw from, by sorting: temperature, then top-k, top-p and min-p."""
  probs = np.exp(np.asarray(logits, np.float64) / sampling.temperature)
  probs /= probs.sum()
  order = np.argsort(-probs)
  if sampling.top_k:
    probs[order[sampling.top_k :]] = 0
  before = np.cumsum(probs[order]) - probs[order]
  probs[order[before >= sampling.top_p * probs.sum()]] = 0
  probs[probs < sampling.min_p * probs.max()] = 0
  return probs / probs.sum()


OPTIONS = [{}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 20, "min_p": 0.02}, {"top_k": 4, "top_p": 0.8}]


@pytest.mark.parametrize("vocab", [5, 256, 700])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_tokens_come_with_their_probabilities(vocab, apart, options):
  """Chi-square over 20,000 draws; blocks of the two-level sum are full, partial or single, in one part or several."""
  random = np.random.default_rng(0)
  logits = jnp.asarray(random.normal(0, 2, vocab), jnp.float32)
  sampling = Sampling(**options)
  keys = jax.random.split(jax.random.key(1), 20_000)
  rows = jnp.broadcast_to(logits, (len(keys), vocab))
  split = [rows[:, start : start + BLOCK] for start in range(0, vocab, BLOCK)] if apart else [rows]
  tokens, logprobs = jax.jit(lambda split: draw(split, keys, sampling))(split)
  np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits)[tokens], rtol=1e-5, atol=1e-5)
  probs = exact(logits, sampling)
  counts = np.bincount(tokens, minlength=vocab)
  assert counts[probs == 0].sum() == 0
  expected = 20_000 * probs[probs > 0]
  often = expected >= 5
  statistic = ((counts[probs > 0] - expected)[often] ** 2 / expected[often]).sum()
  degrees = often.sum() - 1
  assert statistic < degrees + 4 * np.sqrt(2 * degrees)


def test_a_certain_token_is_always_drawn():
  logits = jnp.full((64, 1000), -1e9).at[jnp.arange(64), jnp.arange(64) * 15].set(0.0)
  keys = jax.random.split(jax.random.key(2), 64)
  assert (draw([logits], keys, Sampling())[0] == jnp.arange(64) * 15).all()
