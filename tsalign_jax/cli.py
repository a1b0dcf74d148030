"""The `tsalign` command."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from tsalign_jax.host_memory import use_huge_pages
from tsalign_jax.progress import width
from tsalign_jax.types import UserError

app = typer.Typer(
  add_completion=False,
  no_args_is_help=True,
  pretty_exceptions_enable=False,
  context_settings={"help_option_names": ["-h", "--help"]},
  rich_markup_mode="markdown",
  help="Align a language model with preferences mined from its own answers (TS-Align), on TPU, GPU or CPU.",
)
console = Console(width=width())

ConfigFile = Annotated[Path, typer.Argument(help="YAML file; every key is described in tsalign_jax/config.py.")]
Overrides = Annotated[
  list[str] | None,
  typer.Argument(metavar="[KEY=VALUE]...", help="Replace values of the file, such as align.beta=0.2 rounds=3."),
]
RunFolder = Annotated[Path, typer.Argument(help="Folder of a run.")]


@app.command()
def run(
  config: ConfigFile,
  overrides: Overrides = None,
) -> None:
  """Run TS-Align, or continue a run.

  Each round, the policy answers every prompt several times, the student picks its best and its worst answer, the
  teacher decides which of the two is better, and both models learn from that. Everything is written to the folder
  that the key `run` names: models, tables, metrics.json and report.html.

  The same command continues a run that was stopped at any point; stages that are done are not done again.
  """
  use_huge_pages()
  from tsalign_jax.config import load_config
  from tsalign_jax.loop import run as run_recipe
  from tsalign_jax.progress import terminal_progress
  from tsalign_jax.report.table import closing_table

  settings = load_config(config, overrides or [])
  run_recipe(settings, terminal_progress(console))
  console.print(closing_table(settings.run))
  console.print(f"Report: {settings.run / 'report.html'}", soft_wrap=True)


@app.command("train-reward")
def train_reward(
  config: ConfigFile,
  overrides: Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Replace values of the file, such as training.learning_rate=1e-5."),
  ] = None,
) -> None:
  """Train a reward model on preference pairs, or continue a training.

  It can be a decoder or an encoder, and serve as teacher (kind reward_model) or as student. The folder that the key
  `run` names gets the model as a Hugging Face folder, which transformers loads, and metrics.json: its accuracy on
  held-out pairs, with a 95% interval, beside that of choosing the longer response.

  The same command continues a training that was stopped at any point.
  """
  use_huge_pages()
  from tsalign_jax.config import RewardConfig, load_config
  from tsalign_jax.progress import terminal_progress
  from tsalign_jax.report.reward import reward_summary
  from tsalign_jax.train_reward import train_reward as train

  settings = load_config(config, overrides or [], RewardConfig)
  train(settings, terminal_progress(console))
  console.print(reward_summary(settings.run), highlight=False)
  console.print(f"Model: {settings.run / 'model'}", soft_wrap=True)


@app.command()
def bench(
  config: ConfigFile,
  overrides: Overrides = None,
  prompts: Annotated[int, typer.Option(min=1, help="Training prompts to work on.")] = 32,
  runs: Annotated[int, typer.Option(min=1, help="Timed runs of each phase; the median counts.")] = 3,
) -> None:
  """Time every engine with a configuration's models, prompts and settings on this machine; nothing is written.

  Sampling, scoring and training are shown in tokens, responses and pairs a second, and as shares of what the machine
  does in a large matrix product and in a large sum in place.
  """
  use_huge_pages()
  from tsalign_jax.bench import bench as measure
  from tsalign_jax.bench import table
  from tsalign_jax.config import load_config

  settings = load_config(config, overrides or [])
  results = []
  with console.status("measuring the machine") as status:
    for result in measure(settings, prompts, runs):
      results.append(result)
      status.update(f"{len(results) - 1} of {5 if settings.distil else 4} phases are done")
  console.print(table(results[0], results[1:]))


@app.command()
def report(run: RunFolder) -> None:
  """Write RUN/report.html again and print the closing table."""
  from tsalign_jax.report.html import write_report
  from tsalign_jax.report.table import closing_table

  console.print(closing_table(run))
  console.print(f"Report: {write_report(run)}", soft_wrap=True)


@app.command()
def verdicts(run: RunFolder) -> None:
  """Show how the teacher judged in a run: counts, consistency, a liking for a slot or for length, and cost."""
  from tsalign_jax.report.verdicts import verdict_tables

  for table in verdict_tables(run):
    console.print(table)


@app.command()
def export(
  run: RunFolder,
  out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet.")],
  round: Annotated[int | None, typer.Option(help="Which round's model; the last finished one by default.")] = None,
  student: Annotated[bool, typer.Option("--student", help="The student instead of the policy.")] = False,
  dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
) -> None:
  """Write an aligned model as a Hugging Face folder, which transformers and vLLM load."""
  from tsalign_jax.export import export_model

  export_model(run, out, round=round, student=student, dtype=dtype)
  console.print(f"Wrote {out}", soft_wrap=True)


@app.command("import-gguf")
def import_gguf(
  file: Annotated[Path, typer.Argument(help="GGUF file of a Llama-family model, in any usual quantisation.")],
  out: Annotated[Path, typer.Argument(help="Folder to write.")],
  dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
  """Turn a GGUF file with its tokenizer and chat template into a Hugging Face folder."""
  from tsalign_jax.models.gguf import import_gguf

  import_gguf(file, out, dtype)
  console.print(f"Wrote {out}", soft_wrap=True)


@app.command()
def generate(
  out: Annotated[Path, typer.Argument(help="Folder to write train.jsonl and heldout.jsonl into.")],
  train: Annotated[int, typer.Option(min=1, help="Training prompts.")] = 1000,
  heldout: Annotated[int, typer.Option(min=1, help="Held-out prompts, on other topics with other combinations.")] = 200,
  seed: Annotated[int, typer.Option(help="Two runs with one seed write the same prompts.")] = 0,
) -> None:
  """Generate prompts with instructions that a program can verify, for the `checks` teacher."""
  from tsalign_jax.data.files import write_jsonl
  from tsalign_jax.demo_prompts import generate as generate_prompts

  for name, rows in zip(("train", "heldout"), generate_prompts(train, heldout, seed), strict=True):
    console.print(f"Wrote {write_jsonl(rows, out / f'{name}.jsonl')}", soft_wrap=True)


def main() -> None:
  """Entry point: a UserError is one sentence on standard error and exit code 2."""
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
  try:
    app()
  except UserError as error:
    Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
    sys.exit(2)


if __name__ == "__main__":
  main()
