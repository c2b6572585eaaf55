"""Labels tokens of texts by rule: python examples/label_spans.py TEXTS.jsonl ROWS.jsonl [CHARACTERS]

TEXTS has a field `text` per line. ROWS, of CHARACTERS characters at most (400,000), is what `alignsae extract
--prompts` reads. Every second text is one where a rare concept occurs; a span lists its concept's parent too.
"""

import json
import re
import sys
from itertools import chain, zip_longest
from pathlib import Path

RULES = {
    "option": r"(?<![\w-])--?[a-z][\w-]*",
    "path": r"(?<![\w/])/(?:[\w.+-]+/?)+",
    "call": r"\b\w+\(\)",
    "version": r"\b\d+\.\d+(?:\.\d+)*\b",
    "integer": r"(?<![\w.-])\d+(?![\w.]|-\d)",
    "acronym": r"\b[A-Z]{3,}s?\b",
    "quotation": r"[“\"][^“”\"]{2,80}[”\"]",
}
PARENTS = {"option": "code", "path": "code", "call": "code", "version": "number", "integer": "number"}
RARE = re.compile("|".join(RULES[name] for name in ("option", "path", "version", "quotation")))

lines = Path(sys.argv[1]).read_text().splitlines()
texts = list(dict.fromkeys(json.loads(line)["text"][:1000] for line in lines))
left, rows = int(sys.argv[3]) if len(sys.argv) > 3 else 400_000, []
pairs = zip_longest(filter(RARE.search, texts), (text for text in texts if not RARE.search(text)))
for text in filter(None, chain.from_iterable(pairs)):
    found = [(name, match.span()) for name, rule in RULES.items() for match in re.finditer(rule, text)]
    labelled = [(concept, span) for name, span in found for concept in (name, PARENTS.get(name)) if concept]
    rows.append({"text": text, "spans": [{"start": a, "end": b, "concept": name} for name, (a, b) in labelled]})
    left -= len(text)
    if left < 0:
        break
Path(sys.argv[2]).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
print(f"{len(rows)} texts, {sum(len(row['spans']) for row in rows)} spans: {sys.argv[2]}")
