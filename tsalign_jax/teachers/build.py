"""From a run's configuration to its teacher."""

from tsalign_jax.config import Config
from tsalign_jax.teachers.base import Teacher
from tsalign_jax.teachers.checks import ChecksTeacher, load_plugins


def build_teacher(config: Config) -> Teacher:
  """The teacher that the configuration names, to be opened (`with`) before it judges; its plugins are loaded."""
  load_plugins(config.teacher.plugins)
  return ChecksTeacher(default=config.teacher.default)
