"""A run's policy or student as a Hugging Face folder."""

import shutil
from pathlib import Path

from tsalign_jax.config import load_config
from tsalign_jax.loop import rounds_done
from tsalign_jax.models.hf import save_params
from tsalign_jax.models.loading import language_model, reward_model
from tsalign_jax.parallel.mesh import make_mesh
from tsalign_jax.recipes.ts_align import round_name
from tsalign_jax.report.load import read_configuration
from tsalign_jax.types import UserError


def export_model(run: Path, out: Path, *, round: int | None, student: bool, dtype: str) -> None:
  """Writes the policy or student of a finished round; config and tokenizer come from the model it started from.

  Raises UserError when there is no run, `out` exists, the round is not finished, or the dtype is unknown.
  """
  read_configuration(run)
  if dtype not in ("float32", "bfloat16"):
    raise UserError(f"--dtype: {dtype!r} is unknown; use float32 or bfloat16")
  if out.exists():
    raise UserError(f"{out}: exists already; choose a folder that does not")
  finished = rounds_done(run)
  number = round if round is not None else max(finished, default=0)
  if number not in finished:
    raise UserError(f"{run}: round {number} is not finished; finished rounds: {finished or 'none'}")
  config = load_config(run / "config.yaml")
  if student and config.distil is None:
    raise UserError(f"{run}: its student was not trained (distil is null); it still is that in {config.student.path}")
  model = reward_model(config.student) if student else language_model(config.policy)
  # All devices of this machine, which need not be the one that the run was made on.
  params = model.restore(run / round_name(number) / ("student" if student else "policy"), make_mesh())
  unfinished = out.with_name(out.name + ".unfinished")
  shutil.rmtree(unfinished, ignore_errors=True)
  save_params(params, model.skeleton, model.config, model.folder, unfinished, dtype=dtype)
  unfinished.rename(out)
