"""The stage that picks candidate pairs."""

import dataclasses

import pytest
from stages import judging
from teachers.asked import pairs

from tsalign_jax.config import load_config
from tsalign_jax.stages.mine import mine
from tsalign_jax.types import UserError


def test_no_candidates_at_all_is_said_with_the_reasons_before_a_teacher_is_asked(tmp_path):
  asked = [dataclasses.replace(pair, second=pair.first + " more") for pair in pairs(5)]
  judging.write_inputs(tmp_path, [dataclasses.replace(pair, second=pair.first) for pair in asked[:2]] + asked[2:])
  config = load_config(judging.config_file(tmp_path, {"kind": "checks"}), ["mining.drop_truncated=true"])
  job = judging.job("mine", config, tmp_path)
  job = dataclasses.replace(
    job, options={"strategy": "random", "pairs": 1}, writes={"candidates": tmp_path / "candidates.parquet"}
  )
  assert mine(job) == {"candidates": 3, "dropped": {"all responses identical": 2}}
  judging.write_inputs(tmp_path, [dataclasses.replace(pair, second=pair.first) for pair in asked])
  with pytest.raises(UserError, match=r"mine: no prompt has two responses to choose between \(.*identical: 5\)"):
    mine(job)
