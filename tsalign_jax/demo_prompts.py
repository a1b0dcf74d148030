"""Prompts with verifiable instructions, composed from templates: data for a run that needs no download.

A prompt is a question about an everyday activity followed by three instructions that checks of the `checks` teacher
verify. One of them asks for a length between two bounds, so that neither saying little nor saying much always wins:

    How do I get better at brewing tea? Mention "kettle". Answer in 10 to 25 words. Do not use any commas.

Every instruction can be seen by an uncased student, and is one that a small model may or may not follow.
Held-out prompts are about activities that no training prompt has, and combine checks as none does.
"""

import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

from tsalign_jax.types import UserError


class Activity(NamedTuple):
  """What a prompt is about, words that an answer could well mention, and words that it would tend to use."""

  name: str
  include: tuple[str, ...]
  exclude: tuple[str, ...]


class Instruction(NamedTuple):
  """Arguments of one kind of check, drawn for an activity, and ways to say it to the policy.

  A phrasing may name {limit}, {count} and {words}; {s} is the plural ending of the number before it.
  """

  draw: Callable[[random.Random, Activity], dict]
  phrasings: tuple[str, ...]


_QUESTIONS = (
  "Give me a tip for {}.",
  "What should a beginner know about {}?",
  "What is the hardest part of {}?",
  "What can go wrong when {}?",
  "How do I get better at {}?",
)

# activity | include | exclude
_ACTIVITY_TABLE = """
  brewing tea | kettle leaves mug | water hot
  making coffee | grinder filter aroma | beans cup
  baking bread | crust yeast oven | dough flour
  cooking pasta | salt sauce fork | water pot
  frying eggs | butter spatula yolk | pan heat
  making soup | carrots ladle broth | vegetables pot
  baking cookies | chocolate tray sugar | dough oven
  making salad | tomatoes vinegar crunch | fresh lettuce
  grilling fish | lemon charcoal skin | grill heat
  cooking rice | lid grains steam | water rice
  making pancakes | syrup batter flip | pan flour
  packing lunch | sandwich apple napkin | food healthy
  growing tomatoes | sunlight stake compost | water soil
  planting roses | thorns shovel petals | soil garden
  mowing the lawn | blades sunday edges | grass mower
  raking leaves | autumn gloves pile | leaves yard
  watering houseplants | window pot roots | water soil
  pruning fruit trees | ladder winter saw | branches tree
  composting at home | worms peels bin | waste soil
  picking apples | basket ladder september | ripe tree
  walking a dog | leash park treats | dog walk
  training a puppy | patience reward biscuit | puppy dog
  feeding a cat | bowl kitten schedule | cat food
  keeping goldfish | tank pebbles filter | water fish
  riding a horse | saddle helmet reins | horse balance
  watching birds | binoculars dawn notebook | birds quiet
  keeping bees | hive honey smoke | bees colony
  raising chickens | coop eggs fence | chickens feed
  running outdoors | shoes stretch hill | run pace
  swimming laps | goggles lungs pool | water breathing
  riding a bicycle | helmet brakes tires | bike road
  hiking in the hills | boots map snacks | trail weather
  camping in the woods | stove lantern blanket | tent gear
  lifting weights | gym posture towel | weight muscles
  practicing yoga | mat spine morning | breathing body
  playing tennis | racket serve net | ball court
  playing basketball | hoop dribble team | ball practice
  playing soccer | goal sneakers coach | ball team
  skiing downhill | goggles slope snow | speed balance
  ice skating | blades rink knees | balance ice
  fishing at a lake | hook bait bucket | fish water
  rowing a boat | oars lake rhythm | water boat
  sailing a small boat | wind rope anchor | boat water
  climbing rocks | rope chalk grip | climb safety
  dancing the salsa | hips music partner | steps rhythm
  stretching after work | hamstrings floor towel | muscles body
  playing the piano | keys scales teacher | practice music
  playing the guitar | strings chords pick | practice fingers
  singing in a choir | lungs melody scales | voice sing
  playing the drums | sticks tempo neighbors | rhythm practice
  writing poetry | rhyme notebook metaphor | words feelings
  writing a diary | pen evening memory | thoughts write
  writing letters | stamp envelope pen | write words
  reading novels | library chapter lamp | book read
  painting landscapes | brush canvas sky | colors paint
  drawing portraits | pencil eyes shadow | face practice
  taking photographs | lens sunset tripod | camera light
  knitting scarves | wool needles winter | yarn stitches
  sewing buttons | thread needle shirt | fabric button
  folding paper cranes | crease wings square | paper fold
  building model trains | glue track engine | model details
  carving wood | knife oak sandpaper | wood tools
  making pottery | wheel kiln glaze | clay hands
  collecting stamps | album tweezers history | stamps collection
  playing chess | queen opening clock | moves opponent
  solving crosswords | pencil clues dictionary | words puzzle
  doing jigsaw puzzles | edges table colors | pieces puzzle
  playing card games | deck friends bluff | cards players
  learning Spanish | verbs podcast accent | language practice
  learning to type | keyboard thumbs speed | fingers practice
  studying for exams | notes library sleep | study focus
  speaking in public | microphone audience smile | speech confidence
  telling jokes | timing laughter punchline | funny people
  cleaning the kitchen | sponge sink vinegar | clean dishes
  washing dishes | soap sponge towel | water clean
  doing laundry | detergent socks basket | clothes wash
  ironing shirts | collar steam hanger | iron fabric
  making the bed | pillow sheets blanket | bed morning
  vacuuming carpets | dust corners stairs | vacuum clean
  sorting the trash | glass bin paper | waste recycling
  painting a bedroom | roller tape ladder | paint walls
  fixing a leaky tap | wrench washer bucket | water leak
  hanging pictures | hammer nail level | wall frame
  assembling furniture | screws manual drill | parts tools
  changing a tire | jack wrench spare | car tire
  washing a car | hose sponge wax | water car
  driving at night | headlights mirror coffee | road car
  taking the bus | ticket seat driver | bus stop
  flying with children | snacks toys headphones | plane kids
  packing a suitcase | socks passport zipper | clothes space
  visiting museums | guide ticket statues | art history
  shopping for groceries | list coupons bread | food store
  saving money | jar budget coins | money save
  sleeping well | pillow curtains darkness | sleep bed
  hosting a party | music balloons neighbors | guests food
  choosing gifts | ribbon birthday card | gift person
"""

LENGTH_PHRASINGS = (
  "Answer in {low} to {high} words.",
  "Use between {low} and {high} words.",
  "Write at least {low} and at most {high} words.",
)

INSTRUCTIONS = {
  "max_sentences": Instruction(
    lambda rng, activity: {"limit": rng.choice((1, 2))},
    ("Use at most {limit} sentence{s}.", "Write no more than {limit} sentence{s}."),
  ),
  "numbered_list": Instruction(
    lambda rng, activity: {"count": rng.choice((2, 3, 4))},
    ("Give a numbered list of {count} items.", "Answer as a list numbered from 1 to {count}."),
  ),
  "include_words": Instruction(
    lambda rng, activity: {"words": [rng.choice(activity.include)]},
    ("Mention {words}.", "Be sure to use {words}.", "Include {words} in your answer."),
  ),
  "exclude_words": Instruction(
    lambda rng, activity: {"words": [rng.choice(activity.exclude)]},
    ("Do not use the word {words}.", "Avoid the word {words}.", "Never say {words}."),
  ),
  "contains_question": Instruction(
    lambda rng, activity: {},
    ("Ask me a question in your answer.", "Include a question.", "Put a question in your reply."),
  ),
  "no_commas": Instruction(
    lambda rng, activity: {},
    ("Do not use any commas.", "Write without commas.", "Avoid commas."),
  ),
  "include_number": Instruction(
    lambda rng, activity: {},
    ("Include a number written in digits.", "Use digits to give a number.", "Mention a number in digits."),
  ),
}

# A list has a sentence in each item, and numbers of its own.
_CONFLICTS = ({"max_sentences", "numbered_list"}, {"include_number", "numbered_list"})


def activities(*, heldout: bool) -> list[Activity]:
  """Activities of training prompts, or those kept for held-out ones (every sixth), whatever the seed."""
  rows = [[cell.strip() for cell in line.split("|")] for line in _ACTIVITY_TABLE.strip().splitlines()]
  parsed = [Activity(name, tuple(include.split()), tuple(exclude.split())) for name, include, exclude in rows]
  return _split(parsed, every=6, heldout=heldout)


def combinations(*, heldout: bool) -> list[tuple[str, ...]]:
  """Pairs of kinds of checks, beside the length, of training prompts or of held-out ones (every fourth)."""
  pairs = itertools.combinations(INSTRUCTIONS, 2)
  possible = [kinds for kinds in pairs if not any(conflict <= set(kinds) for conflict in _CONFLICTS)]
  return _split(possible, every=4, heldout=heldout)


def generate(count_train: int, count_heldout: int, seed: int) -> tuple[list[dict], list[dict]]:
  """Training rows and held-out rows, no two alike; a row depends on the seed and its own index only.

  A row is {"prompt": [{"role": "user", "content": ...}], "checks": [{"name": ..., ...}, ...]}.
  Raises UserError for more rows than there are prompts.
  """
  return _rows(count_train, seed, heldout=False), _rows(count_heldout, seed, heldout=True)


def _rows(count: int, seed: int, *, heldout: bool) -> list[dict]:
  split = "heldout" if heldout else "train"
  # Each row has a cell of this product to itself, so no two rows are alike and none depends on another.
  cells = list(itertools.product(activities(heldout=heldout), _QUESTIONS, combinations(heldout=heldout)))
  if not 0 <= count <= len(cells):
    raise UserError(f"{count} {split} prompts cannot be generated; ask for 0 to {len(cells)}")
  random.Random(f"{seed} {split}").shuffle(cells)
  return [_row(random.Random(f"{seed} {split} {index}"), *cells[index]) for index in range(count)]


def _row(rng: random.Random, activity: Activity, question: str, kinds: tuple[str, ...]) -> dict:
  checks = [{"name": kind, **INSTRUCTIONS[kind].draw(rng, activity)} for kind in kinds]
  low, high = rng.choice((8, 10, 12)), rng.choice((20, 25, 30))
  length = rng.choice(LENGTH_PHRASINGS).format(low=low, high=high)
  sentences = [*(_say(check, rng) for check in checks), length]
  rng.shuffle(sentences)
  checks += [{"name": "min_words", "limit": low}, {"name": "max_words", "limit": high}]
  return {
    "prompt": [{"role": "user", "content": " ".join([question.format(activity.name), *sentences])}],
    "checks": checks,
  }


def _say(check: dict, rng: random.Random) -> str:
  words = " and ".join(f'"{word}"' for word in check.get("words", ()))
  plural = "" if check.get("limit") == 1 else "s"
  return rng.choice(INSTRUCTIONS[check["name"]].phrasings).format(**{**check, "words": words, "s": plural})


def _split(items: list, *, every: int, heldout: bool) -> list:
  return [item for index, item in enumerate(items) if (index % every == every - 1) == heldout]
