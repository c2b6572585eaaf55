"""Question templates and biography sentences of the six relations."""

# Slot order of the concepts. Per relation four questions: two for training the dictionary, two held out.
QUESTIONS: dict[str, tuple[str, str, str, str]] = {
    "birth_date": (
        "When was {name} born?",
        "What is the birth date of {name}?",
        "On which day was {name} born?",
        "Can you give the date of birth of {name}?",
    ),
    "birth_city": (
        "Where was {name} born?",
        "What is the birth city of {name}?",
        "In which city was {name} born?",
        "Can you name the birthplace of {name}?",
    ),
    "university": (
        "Which university did {name} attend?",
        "What is the alma mater of {name}?",
        "Where did {name} study?",
        "From which institution did {name} graduate?",
    ),
    "major": (
        "What did {name} study?",
        "What was the major of {name}?",
        "Which subject did {name} major in?",
        "In which field did {name} earn a degree?",
    ),
    "employer": (
        "Who does {name} work for?",
        "What is the employer of {name}?",
        "Which company employs {name}?",
        "At which company does {name} have a job?",
    ),
    "work_city": (
        "Where does {name} work?",
        "What is the work city of {name}?",
        "In which city does {name} work?",
        "Which city does {name} commute to?",
    ),
}
RELATIONS = tuple(QUESTIONS)
TRAIN_TEMPLATES = (0, 1)

SENTENCES: dict[str, tuple[str, ...]] = {
    "birth_date": (
        "{name} was born on {value}.",
        "The birth date of {name} is {value}.",
        "{name} came into the world on {value}.",
        "On the birth certificate of {name} stands {value}.",
        "{name} celebrates the day of birth, {value}.",
    ),
    "birth_city": (
        "{name} was born in {value}.",
        "The birthplace of {name} is {value}.",
        "{name} spent the first years in {value}.",
        "{name} comes from {value}.",
        "The family of {name} lived in {value}.",
    ),
    "university": (
        "{name} attended {value}.",
        "The alma mater of {name} is {value}.",
        "{name} graduated from {value}.",
        "{name} was a student at {value}.",
        "{name} holds a degree of {value}.",
    ),
    "major": (
        "{name} studied {value}.",
        "The major of {name} was {value}.",
        "{name} earned a degree in {value}.",
        "{name} specialised in {value}.",
        "The chosen field of {name} was {value}.",
    ),
    "employer": (
        "{name} works for {value}.",
        "The employer of {name} is {value}.",
        "{name} has a job at {value}.",
        "{name} is on the staff of {value}.",
        "{name} was hired by {value}.",
    ),
    "work_city": (
        "{name} works in {value}.",
        "The office of {name} is in {value}.",
        "{name} commutes to {value}.",
        "The working days of {name} pass in {value}.",
        "{name} is employed in {value}.",
    ),
}


def as_prompt(question: str) -> str:
    """What the language model is given; its answer follows after a space."""
    return f"Q: {question}\nA:"


def split_of(template: int) -> str:
    """Split of the questions of a template."""
    return "train" if template in TRAIN_TEMPLATES else "heldout"
