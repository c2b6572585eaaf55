"""Prompts about public facts: python examples/relations.py PROMPTS.jsonl

Fourteen relations of countries, elements, nouns, adjectives, verbs, days, months and numbers, with nine templates each.
Four templates and half of the subjects are to train on, one and a fifth to choose on (validation), four and the rest
held out; a row has template and subject of the same split, so neither has been met before. A prompt begins with the
same sentence about another subject, the first of its table, which shows the form of an answer; what it gives away is
not asked. A language model does not know all of it: `alignsae ask` keeps what it knows.
"""

import json
import random
import sys
from collections import Counter
from pathlib import Path

# Names of the relations, then subjects with their answers; a dash where there is none, or a disputed one.
FACTS = {
    "capital currency language continent": """
        Japan: Tokyo, yen, Japanese, Asia; France: Paris, euro, French, Europe; Germany: Berlin, euro, German, Europe
        Italy: Rome, euro, Italian, Europe; Spain: Madrid, euro, Spanish, Europe
        Portugal: Lisbon, euro, Portuguese, Europe; Austria: Vienna, euro, German, Europe
        Greece: Athens, euro, Greek, Europe; Finland: Helsinki, euro, Finnish, Europe
        Ireland: Dublin, euro, English, Europe; Belgium: Brussels, euro, -, Europe
        Poland: Warsaw, zloty, Polish, Europe; Hungary: Budapest, forint, Hungarian, Europe
        Sweden: Stockholm, krona, Swedish, Europe; Norway: Oslo, krone, Norwegian, Europe
        Denmark: Copenhagen, krone, Danish, Europe; Iceland: Reykjavik, krona, Icelandic, Europe
        Switzerland: Bern, franc, -, Europe; Romania: Bucharest, leu, Romanian, Europe
        Bulgaria: Sofia, -, Bulgarian, Europe; Ukraine: Kyiv, hryvnia, Ukrainian, Europe
        Russia: Moscow, ruble, Russian, -; Turkey: Ankara, lira, Turkish, -; England: London, pound, English, Europe
        China: Beijing, yuan, Chinese, Asia; Thailand: Bangkok, baht, Thai, Asia
        Vietnam: Hanoi, dong, Vietnamese, Asia; India: New Delhi, rupee, Hindi, Asia
        Pakistan: Islamabad, rupee, Urdu, Asia; Nepal: Kathmandu, rupee, Nepali, Asia
        Bangladesh: Dhaka, taka, Bengali, Asia; Indonesia: Jakarta, rupiah, Indonesian, Asia
        Malaysia: Kuala Lumpur, ringgit, Malay, Asia; Iran: Tehran, rial, Persian, Asia
        Iraq: Baghdad, dinar, Arabic, Asia; Israel: -, shekel, Hebrew, Asia; Jordan: Amman, dinar, Arabic, Asia
        Mongolia: Ulaanbaatar, -, Mongolian, Asia; Cambodia: Phnom Penh, riel, Khmer, Asia
        Egypt: Cairo, pound, Arabic, Africa; Morocco: Rabat, dirham, Arabic, Africa
        Kenya: Nairobi, shilling, Swahili, Africa; Nigeria: Abuja, naira, English, Africa
        Ethiopia: Addis Ababa, birr, Amharic, Africa; Ghana: Accra, cedi, English, Africa
        Tunisia: Tunis, dinar, Arabic, Africa; Algeria: Algiers, dinar, Arabic, Africa
        Senegal: Dakar, franc, French, Africa; Canada: Ottawa, dollar, -, North America
        Mexico: Mexico City, peso, Spanish, North America; Cuba: Havana, peso, Spanish, North America
        Jamaica: Kingston, dollar, English, North America; Brazil: Brasilia, real, Portuguese, South America
        Argentina: Buenos Aires, peso, Spanish, South America; Chile: Santiago, peso, Spanish, South America
        Peru: Lima, sol, Spanish, South America; Colombia: Bogota, peso, Spanish, South America
        Venezuela: Caracas, -, Spanish, South America; Uruguay: Montevideo, peso, Spanish, South America
        Australia: Canberra, dollar, English, -; New Zealand: Wellington, dollar, English, Oceania""",
    "symbol atomic_number": """
        iron: Fe, 26; hydrogen: H, 1; helium: He, 2; lithium: Li, 3; beryllium: Be, 4; boron: B, 5; carbon: C, 6
        nitrogen: N, 7; oxygen: O, 8; fluorine: F, 9; neon: Ne, 10; sodium: Na, 11; magnesium: Mg, 12; aluminum: Al, 13
        silicon: Si, 14; phosphorus: P, 15; sulfur: S, 16; chlorine: Cl, 17; argon: Ar, 18; potassium: K, 19
        calcium: Ca, 20; titanium: Ti, 22; chromium: Cr, 24; manganese: Mn, 25; cobalt: Co, 27; nickel: Ni, 28
        copper: Cu, 29; zinc: Zn, 30; arsenic: As, 33; bromine: Br, 35; silver: Ag, 47; tin: Sn, 50; iodine: I, 53
        barium: Ba, 56; tungsten: W, 74; platinum: Pt, 78; gold: Au, 79; mercury: Hg, 80; lead: Pb, 82; radon: Rn, 86
        radium: Ra, 88; uranium: U, 92; plutonium: Pu, 94""",
    "young plural first_letter": """
        dog: puppy, dogs; cat: kitten, cats; cow: calf, cows; horse: foal, horses; sheep: lamb, sheep
        goat: kid, goats; pig: piglet, pigs; duck: duckling, ducks; goose: gosling, geese; swan: cygnet, swans
        lion: cub, lions; tiger: cub, tigers; bear: cub, bears; wolf: pup, wolves; fox: cub, foxes; deer: fawn, deer
        frog: tadpole, frogs; butterfly: caterpillar, butterflies; owl: owlet, owls; eagle: eaglet, eagles
        kangaroo: joey, kangaroos; rabbit: kit, rabbits; elephant: calf, elephants; whale: calf, whales
        mouse: pup, mice; fish: fry, fish; child: -, children; man: boy, men; woman: girl, women; house: -, houses
        book: -, books; city: -, cities; tree: sapling, trees; hand: -, hands; foot: -, feet; tooth: -, teeth
        knife: -, knives; leaf: -, leaves; church: -, churches; box: -, boxes; king: prince, kings
        queen: princess, queens; day: -, days; night: -, nights; key: -, keys; baby: -, babies; table: -, tables""",
    "antonym comparative": """
        big: small, bigger; hot: cold, hotter; cold: hot, colder; small: big, smaller; tall: short, taller
        long: short, longer; old: -, older; young: old, younger; new: old, newer; good: bad, better
        bad: good, worse; rich: poor, richer; poor: rich, poorer; fast: slow, faster; slow: fast, slower
        strong: weak, stronger; weak: strong, weaker; light: -, lighter; dark: light, darker; high: low, higher
        low: high, lower; hard: soft, harder; soft: hard, softer; wet: dry, wetter; dry: wet, drier
        heavy: light, heavier; happy: sad, happier; sad: happy, sadder; wide: narrow, wider; narrow: wide, narrower
        deep: shallow, deeper; thick: thin, thicker; thin: thick, thinner; early: late, earlier; late: early, later
        loud: quiet, louder; cheap: expensive, cheaper; clean: dirty, cleaner; dirty: clean, dirtier
        bright: dark, brighter; warm: cool, warmer; easy: difficult, easier""",
    "past gerund first_letter": """
        go: went, going; see: saw, seeing; eat: ate, eating; run: ran, running; write: wrote, writing
        take: took, taking; give: gave, giving; come: came, coming; make: made, making; know: knew, knowing
        think: thought, thinking; buy: bought, buying; sing: sang, singing; drink: drank, drinking
        swim: swam, swimming; begin: began, beginning; break: broke, breaking; speak: spoke, speaking
        drive: drove, driving; fly: flew, flying; grow: grew, growing; fall: fell, falling; find: found, finding
        bring: brought, bringing; teach: taught, teaching; catch: caught, catching; sell: sold, selling
        tell: told, telling; sit: sat, sitting; stand: stood, standing; walk: walked, walking; play: played, playing
        jump: jumped, jumping; stop: stopped, stopping; study: studied, studying; carry: carried, carrying
        dance: danced, dancing; build: built, building; sleep: slept, sleeping; keep: kept, keeping
        win: won, winning; lose: lost, losing; forget: forgot, forgetting; choose: chose, choosing""",
    "next": """
        Monday: Tuesday; Tuesday: Wednesday; Wednesday: Thursday; Thursday: Friday; Friday: Saturday
        Saturday: Sunday; Sunday: Monday; January: February; February: March; March: April; April: May; May: June
        June: July; July: August; August: September; September: October; October: November; November: December
        December: January; two: three; three: four; four: five; five: six; six: seven; seven: eight; eight: nine
        nine: ten; ten: eleven; eleven: twelve; twelve: thirteen; thirteen: fourteen; fourteen: fifteen""",
}

# In the order of SPLITS.
TEMPLATES = {
    "capital": """The capital of {x} is
        The capital city of {x} is
        Question: What is the capital of {x}? Answer:
        {x} is a country whose capital is
        The name of the capital of {x} is
        Everyone knows that the capital of {x} is
        The seat of government of {x} is in the city of
        If you visit the capital of {x}, you are in
        The largest embassies in {x} are in its capital,""",
    "currency": """The currency of {x} is the
        The official currency of {x} is the
        Question: What is the currency of {x}? Answer: the
        In {x}, people pay with a currency called the
        The name of the currency of {x} is the
        The money used in {x} is the
        The central bank of {x} issues the
        Prices in {x} are given in the local currency, the
        Before you travel to {x}, change your money into the""",
    "language": """The language spoken in {x} is
        The official language of {x} is
        Question: What is the language of {x}? Answer:
        Most people in {x} speak
        The national language of {x} is
        The people of {x} speak
        Children in {x} grow up speaking
        Newspapers in {x} are written in
        If you move to {x}, you should learn to speak""",
    "continent": """{x} is on the continent of
        The continent of {x} is
        Question: On which continent is {x}? Answer:
        {x} is a country on the continent of
        {x} is located on the continent of
        On the map, {x} belongs to the continent of
        The continent in which {x} lies is
        {x} is one of the countries of
        Geographically, {x} is a part of""",
    "symbol": """The chemical symbol of {x} is
        The symbol for {x} is
        Question: What is the chemical symbol of {x}? Answer:
        In the periodic table, {x} has the symbol
        The chemical symbol for the element {x} is
        Chemists write {x} as
        The abbreviation of the element {x} is
        In chemical formulas, {x} is written as
        On the periodic table, the letters for {x} are""",
    "atomic_number": """The atomic number of {x} is
        The element {x} has the atomic number
        Question: What is the atomic number of {x}? Answer:
        In the periodic table, {x} is element number
        The number of protons in {x} is
        An atom of {x} has a nucleus whose number of protons is
        The nucleus of {x} has a charge of plus
        The position of {x} in the periodic table is number
        Counting protons, an atom of {x} has""",
    "young": """A young {x} is called a
        A baby {x} is called a
        Question: What is a young {x} called? Answer: a
        The young of a {x} is called a
        The name for a baby {x} is a
        Before it grows up, a {x} is called a
        A newborn {x} is known as a
        The offspring of a {x} is a
        When it is little, a {x} is a""",
    "plural": """The plural of {x} is
        The plural form of {x} is
        Question: What is the plural of {x}? Answer:
        One {x}, two
        The plural of the word {x} is
        More than one {x} are called
        I have one {x}, but you have three
        The noun {x} has the plural
        First there was one {x}, and then there were many""",
    "antonym": """The opposite of {x} is
        The antonym of {x} is
        Question: What is the opposite of {x}? Answer:
        {x} is the opposite of
        The opposite of the word {x} is
        Something that is not {x} at all is
        The contrary of {x} is
        The word with the meaning opposite to {x} is
        It is not {x}. On the contrary, it is""",
    "comparative": """The comparative of {x} is
        The comparative form of {x} is
        Question: What is the comparative of {x}? Answer:
        This one is {x}, but that one is even
        The comparative of the adjective {x} is
        It was {x} yesterday, and today it is even
        The adjective {x} has the comparative
        My house is {x}, but yours is much
        If you add more, something {x} becomes""",
    "past": """The past tense of {x} is
        The past tense form of {x} is
        Question: What is the past tense of {x}? Answer:
        Today I {x}. Yesterday I
        The past tense of the verb {x} is
        Every day they {x}, and last week they also
        The simple past of {x} is
        In the past, the verb {x} becomes
        We {x} now, just as a year ago we""",
    "gerund": """The present participle of {x} is
        The gerund of {x} is
        Question: What is the gerund of {x}? Answer:
        I {x}. Right now I am
        The gerund of the verb {x} is
        They often {x}, and at the moment they are
        The ing form of {x} is
        The progressive form of the verb {x} is
        If you {x}, then what you are doing is called""",
    "next": """After {x} comes
        The one after {x} is
        Question: What comes after {x}? Answer:
        {x} is followed by
        What comes next after {x} is
        Right after {x} comes
        The successor of {x} is
        As soon as {x} is over, it is time for
        In order, {x} and then""",
    "first_letter": """The first letter of {x} is
        {x} begins with the letter
        Question: What is the first letter of {x}? Answer:
        The word {x} starts with the letter
        The first letter of the word {x} is
        The spelling of {x} starts with the letter
        The initial letter of {x} is
        In a dictionary, {x} is under the letter
        If you write {x}, the first letter is""",
}
SPLITS = ["train"] * 4 + ["validation"] + ["heldout"] * 4  # of the templates
SUBJECTS = ["train"] * 5 + ["validation"] * 2 + ["heldout"] * 3  # of ten shuffled subjects


def filled(template: str, subject: str) -> str:
    """The template with its subject, a sentence."""
    text = template.strip().format(x=subject)
    return text[0].upper() + text[1:]


shuffled, rows = random.Random(0), []
for columns, table in FACTS.items():
    entries = [entry.strip().split(": ") for line in table.splitlines() for entry in line.split(";") if entry.strip()]
    facts = {}
    for subject, values in entries:
        spelled = [subject[0].upper()] if "first_letter" in columns else []
        facts[subject] = dict(zip(columns.split(), [*values.split(", "), *spelled], strict=True))
    example, *subjects = facts
    shuffled.shuffle(subjects)
    for number, subject in enumerate(subjects):
        for relation, answer in facts[subject].items():
            for place, (split, template) in enumerate(zip(SPLITS, TEMPLATES[relation].splitlines(), strict=True)):
                shown = facts[example][relation]
                if answer not in ("-", shown) and split == SUBJECTS[number % len(SUBJECTS)]:
                    prompt = f"{filled(template, example)} {shown}.\n{filled(template, subject)}"
                    row = {"prompt": prompt, "answer": answer, "concept": relation}
                    rows.append({**row, "template": f"t{place}", "subject": subject, "split": split})
Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in rows))
counts = Counter(row["split"] for row in rows)
print(f"{len(TEMPLATES)} relations, {', '.join(f'{count} {split}' for split, count in counts.items())}: {sys.argv[1]}")
