"""Sampling against a brute-force loop, and what it must not depend on."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from hypothesis import strategies as st

from tsalign_jax.config import Policy, Sampling
from tsalign_jax.data.batching import prompts_only
from tsalign_jax.models.loading import language_model
from tsalign_jax.sampling import cache
from tsalign_jax.sampling.draw import draw
from tsalign_jax.sampling.engine import branch_keys, build_sampler, prompt_widths
from tsalign_jax.types import Finish, UserError

STOP = (2, 5)
SAMPLING = Sampling(responses=3, max_new_tokens=12, batch_prompts=4, temperature=0.8, top_p=0.95)
PROMPTS = [(7, [5, 6, 7]), (11, [9, 10, 11, 12, 13]), (13, [20]), (17, [30, 31]), (19, [40, 41, 42])]
KEY = jax.random.key(0)
one_token = jax.jit(lambda logits, key: draw([logits], key, SAMPLING)[0])


@pytest.fixture(params=["unrolled", "stacked"])
def layout(request):
  return request.param


def handle(folder, layout="unrolled"):
  return language_model(Policy(path=folder, dtype="float32", layout=layout))


def sample(model, mesh, prompts, sampling=SAMPLING, done=(), stop=STOP):
  sampler = build_sampler(model, mesh, sampling, stop)
  return dict(pair for harvest in sampler.run(model.load(mesh), prompts, KEY, done) for pair in harvest)


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_sampling_equals_a_loop_over_the_whole_sequence(family, layout, tmp_path, one_device):
  peer = tiny.decoder(family, tmp_path)
  limit = 3 * cache.PHASE
  setting = SAMPLING.model_copy(update={"batch_prompts": 1, "lanes": 2, "max_new_tokens": limit})  # one after the other
  ours = sample(handle(tmp_path, layout), one_device, PROMPTS[:2], setting)
  for prompt_id, prompt in PROMPTS[:2]:
    keys = branch_keys(KEY, jnp.asarray([prompt_id]), jnp.arange(3)[None])[0]
    for key, response in zip(keys, ours[prompt_id], strict=True):
      tokens, logprob = list(prompt), 0.0
      for step in range(limit):
        logits = peer(torch.tensor([tokens])).logits[0, -1].detach()
        token = int(one_token(logits.numpy()[None], jax.random.fold_in(key, step)[None])[0])
        logprob += torch.log_softmax(logits, -1)[token].item()
        tokens.append(token)
        if token in STOP:
          break
      assert response.tokens == tokens[len(prompt) :]
      assert response.logprob == pytest.approx(logprob, abs=1e-3)
      assert response.finish == (Finish.STOP if tokens[-1] in STOP else Finish.LENGTH)


def test_segments_of_the_cache_do_not_matter(llama, one_device, monkeypatch):
  """Branches of many phases come and go while their keys lie in one segment, or in four."""
  setting = SAMPLING.model_copy(update={"max_new_tokens": 40, "batch_prompts": 2, "lanes": 2})
  whole = sample(llama, one_device, PROMPTS, setting)
  monkeypatch.setattr(cache, "SHORTEST", 8)
  build_sampler.cache_clear()
  assert len(build_sampler(llama, one_device, setting, STOP).empty(32).own) == 4
  assert len({len(response.tokens) for row in whole.values() for response in row}) > 3
  assert _close(sample(llama, one_device, PROMPTS, setting), whole)
  build_sampler.cache_clear()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
  folder = tmp_path_factory.mktemp("llama")
  tiny.decoder("llama", folder)
  return handle(folder)


@pytest.fixture(scope="module")
def expected(llama, one_device):
  """Every prompt sampled on its own."""
  alone = SAMPLING.model_copy(update={"batch_prompts": 1})
  return {i: sample(llama, one_device, [(i, tokens)], alone)[i] for i, tokens in PROMPTS}


@hypothesis.settings(max_examples=12)
@hypothesis.given(
  order=st.permutations(PROMPTS),
  grid=st.sampled_from([(1, 1), (1, 3), (2, 3), (3, 2)]),
  done=st.sets(st.sampled_from([i for i, _ in PROMPTS])),
)
def test_responses_do_not_depend_on_order_slots_lanes_or_what_is_done(llama, expected, one_device, order, grid, done):
  slots, lanes = grid
  setting = SAMPLING.model_copy(update={"batch_prompts": slots, "lanes": lanes})
  ours = sample(llama, one_device, order, setting, done)
  assert _close(ours, {i: responses for i, responses in expected.items() if i not in done})


def test_sampling_over_eight_devices_equals_one(llama, expected, eight_devices):
  assert _close(sample(llama, eight_devices, PROMPTS), expected)


def test_a_prompt_waits_for_few_others_however_many_devices_there_are(llama, eight_devices):
  setting = SAMPLING.model_copy(update={"batch_prompts": 16, "max_new_tokens": 40})
  sampler, prompts = build_sampler(llama, eight_devices, setting, STOP), [(n, [5 + n, 6]) for n in range(48)]
  harvests = list(sampler.run(llama.load(eight_devices), prompts, KEY))
  assert (sampler.slots, sampler.admitted, sampler.harvested) == (16, 4, 2)
  assert sorted(i for harvest in harvests for i, _ in harvest) == [*range(48)]
  early = [len(harvest) for harvest in harvests[: len(harvests) // 2]]
  assert min(early) < sampler.admitted, early


def test_parameters_that_are_as_they_are_multiplied_are_not_copied(tmp_path, one_device):
  tiny.decoder("llama", tmp_path)
  model = language_model(Policy(path=tmp_path, dtype="bfloat16"))
  params = model.for_inference.load(one_device)
  prepared = build_sampler(model, one_device, SAMPLING, STOP).prepare(params)
  assert {name: a.unsafe_buffer_pointer() for name, a in params.items()} == {
    name: a.unsafe_buffer_pointer() for name, a in prepared.items()
  }


def test_prompts_of_several_widths_in_one_run(llama, one_device):
  """Each width has its own program, and what is sampled does not depend on which one a prompt is in."""
  random = np.random.default_rng(0)
  lengths = [3, 150, 40, 60, 20, 33, 64, 90]
  prompts = [(n, random.integers(3, 97, length).tolist()) for n, length in enumerate(lengths)]
  narrow, wide = (SAMPLING.model_copy(update={"batch_prompts": slots, "max_new_tokens": 6}) for slots in (1, 8))
  assert len(set(prompt_widths(lengths, 1).values())) == 3 and len(set(prompt_widths(lengths, 8).values())) == 1
  sampler = build_sampler(llama, one_device, narrow, STOP)
  widths = []
  empty = lambda width: widths.append(width) or sampler.empty(width)  # noqa: E731
  ours = dataclasses.replace(sampler, empty=empty).run(llama.load(one_device), prompts, KEY, {4})
  ours = dict(pair for harvest in ours for pair in harvest)
  assert widths == [160, 64, 32]
  assert _close(ours, sample(llama, one_device, prompts, wide, {4}))


@pytest.mark.parametrize("devices", ["one_device", "eight_devices"])
def test_prompts_of_known_widths_compile_nothing(devices, llama, request):
  mesh, random, compiled = request.getfixturevalue(devices), np.random.default_rng(0), []
  sampler, params = build_sampler(llama, mesh, SAMPLING, STOP), llama.load(mesh)

  def run():
    prompts = [(n, random.integers(3, 97, length).tolist()) for n, length in enumerate([10] * 9 + [90] * 9)]
    assert len(list(sampler.run(params, prompts, KEY))) > 3

  def listen(event, seconds, **about):
    compiled.extend([about] * event.endswith("backend_compile_duration"))

  run()
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    jax.jit(lambda x: x + 1)(np.ones(77)).block_until_ready()
    heard = len(compiled)
    run()
  finally:
    jax.monitoring.clear_event_listeners()
  assert heard == 1 == len(compiled)


def test_a_model_whose_probabilities_are_no_numbers_is_named(llama, one_device):
  sampler, params = build_sampler(llama, one_device, SAMPLING, STOP), llama.load(one_device)
  params = {name: array * jnp.nan if "norm" in name else array for name, array in params.items()}
  with pytest.raises(UserError, match=r"llama0?: its log-probabilities are not finite"):
    list(sampler.run(params, PROMPTS, KEY))


def test_the_cache_is_handed_on_and_never_copied(llama, one_device):
  sampler = build_sampler(llama, one_device, SAMPLING, STOP)
  params, slots = sampler.prepare(llama.load(one_device)), sampler.empty(32)
  before = slots
  rows = prompts_only([[5, 6, 7]] * sampler.admitted, 32)
  slots = sampler.admit(params, slots, rows, np.zeros(sampler.admitted, int), np.zeros(sampler.slots, int))
  admitted = slots
  sampler.decode(params, slots, np.zeros(sampler.slots, bool), 1, KEY)
  for state in (before, admitted):
    assert all(array.is_deleted() for array in jax.tree.leaves((state.trunk, state.own, state.recent)))


def test_bfloat16_caches_are_updated_where_they_are(tmp_path, one_device):
  """XLA has no bfloat16 updates on CPUs, and would make a float32 copy of a whole cache for each."""
  tiny.decoder("llama", tmp_path)
  model = language_model(Policy(path=tmp_path, dtype="bfloat16"))
  setting = SAMPLING.model_copy(update={"responses": 8, "max_new_tokens": 1024})
  sampler = build_sampler(model, one_device, setting, STOP)
  params, slots = model.for_inference.load(one_device), sampler.empty(32)
  program = sampler.decode.lower(params, slots, np.zeros(sampler.slots, bool), 1, KEY).compile()
  kept = sum(array.nbytes for array in jax.tree.leaves(slots.own))
  assert program.memory_analysis().temp_size_in_bytes < kept / 4


def test_no_response_is_longer_than_the_limit(llama, one_device):
  setting = SAMPLING.model_copy(update={"max_new_tokens": 20, "lanes": 2})
  longer = sample(llama, one_device, PROMPTS, setting, stop=())
  for limit in (1, cache.PHASE, cache.PHASE + 1):
    shorter = sample(llama, one_device, PROMPTS, setting.model_copy(update={"max_new_tokens": limit}), stop=())
    for i, responses in shorter.items():
      assert [r.tokens for r in responses] == [r.tokens[:limit] for r in longer[i]]
      assert all(r.finish == Finish.LENGTH for r in responses)


def test_a_continued_run_repeats_bfloat16_samples_bit_for_bit(tmp_path, one_device):
  tiny.decoder("qwen3", tmp_path)
  model = language_model(Policy(path=tmp_path, dtype="bfloat16"))
  # Long enough for several segments, and for lanes that end at very different times.
  setting = SAMPLING.model_copy(update={"responses": 4, "batch_prompts": 2, "lanes": 2, "max_new_tokens": 200})
  whole = sample(model, one_device, PROMPTS, setting)
  assert len({len(response.tokens) // cache.PHASE for row in whole.values() for response in row}) > 8
  rest = sample(model, one_device, PROMPTS[::-1], setting, done={7, 13})
  assert rest == {i: responses for i, responses in whole.items() if i not in {7, 13}}


def test_branches_that_have_ended_do_not_go_on(llama, one_device):
  every = tuple(range(97))  # whatever is drawn first ends the response
  responses = sample(llama, one_device, PROMPTS, stop=every)
  assert all(len(r.tokens) == 1 and r.finish == Finish.STOP for row in responses.values() for r in row)


def test_different_branches_and_prompts_get_different_responses(llama, one_device):
  rows = sample(llama, one_device, [(1, [5, 6]), (2, [5, 6])])
  texts = {tuple(response.tokens) for row in rows.values() for response in row}
  assert len(texts) == 6


def test_prompts_share_widths_unless_there_are_enough_to_fill_the_slots():
  assert prompt_widths([10, 20, 40, 50, 130], slots=1) == {10: 32, 20: 32, 40: 64, 50: 64, 130: 160}
  assert prompt_widths([10, 20, 40, 50, 130], slots=2) == {10: 48, 20: 48, 40: 48, 50: 160, 130: 160}
  assert prompt_widths([10, 40, 50, 100], slots=2) == {10: 48, 40: 48, 50: 112, 100: 112}
  assert prompt_widths([10, 40, 40, 100, 110], slots=2) == {10: 48, 40: 48, 100: 112, 110: 112}
  assert prompt_widths([70, 120], slots=1) == {70: 128, 120: 128}  # less than half, or it is not worth a program
  assert set(prompt_widths([10, 40, 50, 100], slots=8).values()) == {112}


def _close(ours, expected):
  assert ours.keys() == expected.keys()
  pairs = [pair for i in ours for pair in zip(ours[i], expected[i], strict=True)]
  same = all(x.tokens == y.tokens and x.finish == y.finish for x, y in pairs)
  return same and np.allclose([x.logprob for x, _ in pairs], [y.logprob for _, y in pairs], atol=1e-4)
