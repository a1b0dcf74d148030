"""From a teacher's configuration to the teacher."""

from tsalign_jax import config as settings
from tsalign_jax.teachers.base import Teacher
from tsalign_jax.teachers.checks import ChecksTeacher, load_plugins


def build_teacher(teacher: settings.ChecksTeacher) -> Teacher:
  """The teacher that the configuration names, its plugins loaded."""
  load_plugins(teacher.plugins)
  return ChecksTeacher(default=teacher.default)
