"""From a run's configuration to its teacher."""

from tsalign_jax import config as settings
from tsalign_jax.teachers.base import Teacher
from tsalign_jax.teachers.chat import Clock
from tsalign_jax.teachers.checks import ChecksTeacher
from tsalign_jax.teachers.ensemble import Ensemble
from tsalign_jax.teachers.llm_judge import LLMJudge
from tsalign_jax.teachers.ranker import Ranker
from tsalign_jax.teachers.reward_model import RewardModelTeacher


def build_teacher(config: settings.Config, clock: Clock | None = None) -> Teacher:
  """The teacher that the configuration names, to be opened (`with`) before it judges.

  Raises UserError for whatever can be wrong with it before it is asked anything.
  """
  return _build(config.teacher, config, "teacher", clock or Clock())


def build_judges(config: settings.Config, clock: Clock | None = None) -> dict[str, Teacher]:
  """The further judges of the evaluation, by name; raises what `build_teacher` does."""
  return {
    name: _build(judge, config, f"evaluation.judges.{name}", clock or Clock())
    for name, judge in config.evaluation.judges.items()
  }


def _build(teacher: settings.AnyTeacher, config: settings.Config, where: str, clock: Clock) -> Teacher:
  run = config.run
  match teacher:
    case settings.ChecksTeacher():
      return ChecksTeacher(teacher.default, teacher.plugins)
    case settings.RewardModelTeacher():
      return RewardModelTeacher(teacher, run, where, config.mesh)
    case settings.JudgeTeacher():
      return LLMJudge(teacher, run, where, clock)
    case settings.RankerTeacher():
      return Ranker(teacher, run, where, clock)
    case settings.EnsembleTeacher():
      members = [_build(each, config, f"{where}.members.{index}", clock) for index, each in enumerate(teacher.members)]
      return Ensemble(members, teacher.vote, where)
