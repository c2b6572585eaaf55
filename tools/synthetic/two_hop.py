"""Two-hop questions: ten relations to other persons, then ten attributes of the person that is reached.

"What is the employer of the mentor of NAME?" is answered in steps, "BRIDGE; EMPLOYER". Each step has rows of its own:
the prompt up to "A:" is labelled with the first relation, the prompt that goes on with " BRIDGE;" with the attribute.
"""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tools.synthetic.sentences import QUESTIONS, SENTENCES, as_prompt, split_of
from trainer.errors import UserError

ASKED = 3  # attributes that are asked of each person's ten relations

# First hop: relation -> what the other person does.
_VERBS = {
    "mentor": ("mentors", "guides"),
    "doctor": ("treats", "heals"),
    "landlord": ("houses", "rents a home to"),
    "lawyer": ("defends", "speaks in court for"),
    "dentist": ("fills the teeth of", "does dental work for"),
    "accountant": ("keeps the books of", "does the taxes of"),
    "coach": ("coaches", "trains"),
    "tutor": ("tutors", "gives lessons to"),
    "editor": ("edits", "corrects the texts of"),
    "rival": ("rivals", "envies"),
}
# Relation -> one wording per question template.
RELATIVES: dict[str, tuple[str, ...]] = {
    relation: (
        f"the {relation} of {{name}}",
        f"{{name}}'s {relation}",
        f"the person who {first} {{name}}",
        f"the one who {second} {{name}}",
    )
    for relation, (first, second) in _VERBS.items()
}
_MORE_QUESTIONS: dict[str, tuple[str, str, str, str]] = {
    "hobby": (
        "Which hobby does {name} have?",
        "What is the hobby of {name}?",
        "How does {name} spend free time?",
        "What does {name} do on Sundays?",
    ),
    "pet": (
        "Which pet does {name} keep?",
        "What is the pet of {name}?",
        "Which animal lives with {name}?",
        "What kind of animal does {name} own?",
    ),
    "dish": (
        "Which dish does {name} like best?",
        "What is the favourite dish of {name}?",
        "What does {name} love to eat?",
        "Which meal does {name} always order?",
    ),
    "instrument": (
        "Which instrument does {name} play?",
        "What is the instrument of {name}?",
        "On what does {name} make music?",
        "What does {name} play in the orchestra?",
    ),
}
_MORE_SENTENCES: dict[str, tuple[str, ...]] = {
    "hobby": (
        "{name} has the hobby {value}.",
        "The hobby of {name} is {value}.",
        "{name} spends free time on {value}.",
        "On Sundays {name} goes in for {value}.",
    ),
    "pet": (
        "{name} keeps a {value}.",
        "The pet of {name} is a {value}.",
        "{name} lives with a {value}.",
        "At home {name} has a {value}.",
    ),
    "dish": (
        "{name} likes {value} best.",
        "The favourite dish of {name} is {value}.",
        "{name} loves to eat {value}.",
        "{name} always orders {value}.",
    ),
    "instrument": (
        "{name} plays the {value}.",
        "The instrument of {name} is the {value}.",
        "{name} makes music on the {value}.",
        "In the orchestra {name} plays the {value}.",
    ),
}
_VALUES = {
    "hobby": ("Competitive Historical Outdoor Urban", "Archery Chess Cycling Dancing Fencing Fishing Painting Sailing"),
    "pet": ("Black Brown Grey Spotted White", "Cat Dog Ferret Lizard Parrot Rabbit Tortoise"),
    "dish": ("Baked Fried Smoked Spicy Stuffed", "Aubergine Dumplings Mushrooms Noodles Peppers Potatoes Trout"),
    "instrument": ("Alto Baroque Bass Electric Tenor", "Clarinet Flute Guitar Horn Recorder Saxophone Trombone"),
}
ATTRIBUTES = QUESTIONS | _MORE_QUESTIONS
TWO_HOP_RELATIONS = (*RELATIVES, *ATTRIBUTES)  # slot order of the concepts
TWO_HOP_SENTENCES: dict[str, tuple[str, ...]] = {
    **{r: tuple(f"{w[:1].upper()}{w[1:]} is {{value}}." for w in wordings) for r, wordings in RELATIVES.items()},
    **SENTENCES,
    **_MORE_SENTENCES,
}


def with_relatives(persons: Sequence[dict[str, str]], seed: int) -> list[dict[str, str]]:
    """The persons with four more attributes and, for each relation of RELATIVES, the name of another person.

    Each relation is one cycle through all persons: nobody is related to themselves, and everybody is reached once.
    UserError for fewer persons than it takes to ask every attribute.
    """
    least = -(-len(ATTRIBUTES) // ASKED)
    if len(persons) < least:
        raise UserError(f"--persons {len(persons)}: --hops 2 needs at least {least}")
    rng = random.Random(f"{seed} relatives")
    values = {kind: [" ".join(pair) for pair in itertools.product(*map(str.split, v))] for kind, v in _VALUES.items()}
    found = [person | {kind: rng.choice(some) for kind, some in values.items()} for person in persons]
    for relation in RELATIVES:
        order = rng.sample(range(len(found)), len(found))
        for one, other in itertools.pairwise([*order, order[0]]):
            found[one][relation] = persons[other]["name"]
    return found


def steps(index: int, persons: Mapping[str, dict[str, str]], name: str) -> tuple[list[Any], list[Any]]:
    """Rows of the first and of the second step for all questions about the `index`-th person.

    A swap keeps what the subject of a row says: of the first step the person and what is asked about the bridge, of the
    second the bridge.
    """
    asked = [list(ATTRIBUTES)[(ASKED * index + i) % len(ATTRIBUTES)] for i in range(ASKED)]
    rows = [*_rows(persons, name, asked)]
    return [first for first, _ in rows], [second for _, second in rows]


def _rows(
    persons: Mapping[str, dict[str, str]], name: str, asked: Sequence[str]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for relation, attribute in itertools.product(RELATIVES, asked):
        bridge = persons[name][relation]
        answer = persons[bridge][attribute]
        for template, (wording, question) in enumerate(zip(RELATIVES[relation], ATTRIBUTES[attribute], strict=True)):
            prompt = as_prompt(question.format(name=wording.format(name=name)))
            where = {"template": template, "split": split_of(template)}
            yield (
                {
                    "prompt": prompt,
                    "answer": f"{bridge}; {answer}",
                    "concept": relation,
                    **where,
                    "subject": f"{name}: {attribute}",
                },
                {"prompt": f"{prompt} {bridge};", "answer": answer, "concept": attribute, **where, "subject": bridge},
            )
