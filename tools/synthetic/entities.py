"""Invented people, places and institutions, composed from syllable tables.

Every list is a pure function of this file: the syllables are combined in a fixed order, shuffled with a fixed seed and
cut to the length that the caller asks for, so a shorter list is a prefix of a longer one.
"""

import itertools
import random

from trainer.errors import UserError

# Lengths of the lists of the benchmark in arXiv 2512.02004.
DEFAULT_SIZES = {
    "first_names": 411,
    "middle_names": 461,
    "last_names": 1002,
    "cities": 250,
    "universities": 341,
    "majors": 101,
    "companies": 327,
}

_SYLLABLES: dict[str, tuple[str, str]] = {
    "first_names": (
        "Al Ben Cal Dar El Fen Gar Hal Is Jor Kel Lor Mar Nel Or Per Quin Ros Sel Tam Ul Vel Wen Yor",
        "a an ara en ena eth ia ian ica in ina is ith o on ora ric ta us wen",
    ),
    "middle_names": (
        "Ab Bri Cae Dev Em Fay Gre Hol Iv Jas Kor Lys Mae Nor Os Pae Rae Sho Tri Una Vio Wyn Xan Zed",
        "bel ce den dra fin gan len lia lo man mir nac nes ra ran rel sa sha tin ver vin",
    ),
    "last_names": (
        "Ash Bar Black Bram Brook Carr Clay Cold Dun East Fair Fern Ford Glen Gold Grey Hart Haw Hill Kirk Lang Marsh "
        "Mill Moor North Oak Pen Red Ridge Rock Sand Stone Thorn Under Wal West",
        "ack all am beck berg bourne bury by combe dale den ell er erson field forth gate ham hurst ing ingham "
        "ington land ley man mere more sby stead ton well wick wood worth",
    ),
    "cities": (
        "Ar Bel Cor Del Es Fal Gal Har Il Jun Kar Lin Mon Nar Ost Pol Riv Sol Tor Ver",
        "abad adale aport avik axton eda ego emont enza ersk igrad illo imar insk iville olis omar onia orf ovo",
    ),
    "universities": (
        "Ath Bryn Cael Dray Eld Fro Gwen Hux Ing Jar Kest Lam Mer Nym Ox Pem Rad Syl Tre Usk",
        "aby acre adon aire alon anby aven edge elm emer endon erby esk ester ewin omby oner ordon uxley yre",
    ),
    "companies": (
        "Act Bio Cyb Dat Ever Flux Gen Hyp Inno Jet Kin Lum Meta Neo Omni Pix Quant Rob Syn Tri",
        "acor adyne alix amar ara avis edra elia enix era estra exa ica idon ios ivo ola omic onix ura",
    ),
}
_MAJOR_PARTS = (
    "Applied Clinical Comparative Computational Cultural Digital Environmental Experimental Industrial Marine "
    "Theoretical",
    "Anthropology Biology Chemistry Design Economics Geography History Linguistics Mathematics Pharmacology Physics "
    "Psychology",
)
_UNIVERSITY_KINDS = ("University", "College", "Institute", "Polytechnic", "Academy")
_COMPANY_KINDS = ("Systems", "Energy", "Foods", "Motors", "Logistics", "Media", "Partners", "Robotics")


def names(kind: str, count: int) -> list[str]:
    """The first `count` distinct entities of `kind` (a key of DEFAULT_SIZES). UserError when the tables hold fewer."""
    heads, tails = (part.split() for part in (_MAJOR_PARTS if kind == "majors" else _SYLLABLES[kind]))
    separator = " " if kind == "majors" else ""
    pool = list(dict.fromkeys(separator.join(pair) for pair in itertools.product(heads, tails)))
    if not 1 <= count <= len(pool):
        raise UserError(f"--{kind.replace('_', '-')} {count}: between 1 and {len(pool)} can be composed")
    random.Random(f"alignsae {kind}").shuffle(pool)
    chosen = pool[:count]
    kinds = {"universities": _UNIVERSITY_KINDS, "companies": _COMPANY_KINDS}.get(kind)
    return [f"{root} {kinds[i % len(kinds)]}" for i, root in enumerate(chosen)] if kinds else chosen


def company_cities(companies: list[str], cities: list[str]) -> dict[str, str]:
    """City of every company: the employer determines the work city, as in the paper."""
    chooser = random.Random("alignsae company cities")
    return {company: chooser.choice(cities) for company in companies}
