"""What is logged, saved, tracked or shown passes through `redact`: no credential survives it."""

import re
import shlex

MASK = "***"
# Where a URL begins. Two letters at least: a drive letter is none.
_SCHEME = r"(?<![A-Za-z0-9+.\-])[A-Za-z][A-Za-z0-9+.\-]{1,40}:"
# Credentials before the host: all up to the last @ of the authority; else `user:password@` with the / ? # that
# SQLAlchemy allows in a password (a port is none, nor is an IPv6 address); else what pathlib makes of a URL, with one
# slash.
_MOST = "{0,2048}"  # characters of a credential; without a bound a hostile text would take quadratic time
_USERINFO = re.compile(
    rf"({_SCHEME}//)(?:[^\s/?#<>\"]{_MOST}@|(?!\[)[^\s/?#:@<>\"]{_MOST}:(?!\d+(?:[/?#]|\Z|\s))[^\s@<>\"]{_MOST}@)"
    rf"|({_SCHEME}/)(?!/)[^\s/?#:@<>\"]{_MOST}:[^\s/?#@<>\"]{_MOST}@"
)
_SECRET_WORDS = (
    r"[A-Za-z0-9]*(?:passw(?:or)?d|passphrase|secret|token)|(?:ssh|db|my)?pass|pwd|credentials?|signature|auth|jwt"
    r"|(?:api|access|private|secret|account|shared|service|client|subscription|encryption|ssh)[_.\-]?key(?:[_.\-]?id)?"
    r"|key[_.\-]?pair[_.\-]?id|odbc[_.\-]?connect"
)
# Names of settings, options and parameters whose last word says that the value is secret; `pad_token` says no such
# thing.
_SECRET_NAME = (
    rf"(?:(?!(?:pad|eos|bos|unk|cls|sep|mask|last|first|prompt|concept)[_.\-]token\b)"
    rf"(?:[A-Za-z0-9]+[_.\-])*(?:{_SECRET_WORDS}))"
)
_VALUE = r"(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s\"'&;,#]+)"
_PARAMETER_VALUE = r"[^\s&;#\"'<>]+"
# In the query or fragment of a URL more names are secret than in a text, where `key=` and `code=` are everyday words.
_QUERY_NAMES = (
    rf"{_SECRET_NAME}|[A-Za-z]+-Policy|policy|key|code|sig|session(?:[_\-]?id)?|AWSAccessKeyId|GoogleAccessId"
)
_WORD = re.compile(r"\S+")
_QUERY = re.compile(r"[?#].*")
_PARAMETER = re.compile(rf"(?i)([?&;#])({_QUERY_NAMES})=({_PARAMETER_VALUE})")
# A value that no name betrays but that reads like a key: at least twenty letters and digits mixed, no path.
_KEY_LIKE = re.compile(r"([?&;#=])(?=[A-Za-z_\-]*\d)(?=[\d_\-]*[A-Za-z])[A-Za-z0-9_+~%\-]{20,}={0,2}(?![^&;#\s])")
_ENCODED_USERINFO = re.compile(r"(?i)%3A%2F%2F(?:(?!%2F)[^\s&;#])*%40")
_ASSIGNMENT = re.compile(rf"(?i)(?<![A-Za-z0-9_.\-])(-{{0,2}}(?:{_SECRET_NAME}))(\s?=\s?)(?!=)({_VALUE})")
_OPTION = re.compile(rf"(?i)(?<![A-Za-z0-9_.\-])(--?(?:{_SECRET_NAME}))(\s+)(?!-)({_VALUE})")
_HEADER = re.compile(
    r"(?i)\b((?:proxy-)?authorization|x-[a-z\-]*(?:key|token)|password|passwd|secret)(['\"]?:\s*)"
    rf"(?:(?:basic|bearer|token)\s+)?({_VALUE})"
)
# `pipe:` begins a command where it opens the text or a value, elsewhere where no space follows (as in "a pipe:
# command").
_PIPE = re.compile(r"(?i)(?:(\A\s*pipe:)|((?<==)[\"'`]?pipe:)|(?<![A-Za-z0-9_])(pipe:)(?=\S))([^\n]*)")
_SHORTENED = re.compile(r"(?:[\w./+\-]+)? ?\.\.\.")
_ENVIRONMENT = re.compile(r"[A-Za-z_]\w*=[^$`(){};&|<>]*")
_PROGRAM = re.compile(r"[\w./+][\w./+\-]*")


def redact(text: str) -> str:
    """A URL, a `pipe:` command or a free text that holds such, without what must stay secret.

    - User and password of URLs become `***`, whatever the scheme, its case, or the chain (`simplecache::http://u:p@h`).
    - So do values of parameters, settings, options and headers that are named like a secret (`X-Amz-Signature=`,
      `--token`, `PASSWORD=`), and long values of URL parameters that read like a key.
    - Of a `pipe:` command its program stays, since nothing else in a command can be told from a secret; it ends with
      the line.

    What holds none of this is returned unchanged, and so is what was redacted before.
    """
    text = _PIPE.sub(_short_command, text)
    text = _WORD.sub(lambda found: _url(found[0]) if ":/" in found[0] else found[0], text)
    text = _HEADER.sub(rf"\1\2{MASK}", text)
    text = _OPTION.sub(rf"\1\2{MASK}", text)
    return _ASSIGNMENT.sub(rf"\1\2{MASK}", text)


def _url(word: str) -> str:
    """A word that holds a URL."""
    if "@" in word:
        word = _USERINFO.sub(lambda found: f"{found[1] or found[2]}{MASK}@", word)
    query = _QUERY.search(word, word.index(":/"))
    if query is None:
        return word
    masked = _PARAMETER.sub(rf"\1\2={MASK}", query[0])
    masked = _KEY_LIKE.sub(rf"\1{MASK}", masked)
    return word[: query.start()] + _ENCODED_USERINFO.sub(f"%3A%2F%2F{MASK}%40", masked)


def _short_command(found: re.Match[str]) -> str:
    scheme, command = found[1] or found[2] or found[3], found[4]
    if _SHORTENED.match(command.lstrip()):
        return found[0]
    return f"{scheme}{_program(command)} ..."


def _program(command: str) -> str:
    """First word of a shell command that sets no variable; empty when that is not plain to see."""
    try:
        words = shlex.split(command)
    except ValueError:  # unbalanced quotes
        return ""
    for word in words:
        if _ENVIRONMENT.fullmatch(word):
            continue
        return word if _PROGRAM.fullmatch(word) else ""
    return ""
