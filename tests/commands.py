"""`tsalign` commands one after the other in one process: each line of input is the arguments of one, as JSON.

Each answer is a line too: exit code, standard output and standard error. Python starts and imports once for all.
"""

import contextlib
import io
import json
import sys
import traceback

from tsalign_jax import cli


def answer(arguments: list[str]) -> tuple[int, str, str]:
  sys.argv, code = ["tsalign", *arguments], 0
  with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
    try:
      cli.main()
    except SystemExit as end:
      code = end.code or 0
    except Exception:  # what a person would see of a mistake of ours
      traceback.print_exc()
      code = 1
  return code, out.getvalue(), errors.getvalue()


if __name__ == "__main__":
  for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)
