"""The words of a caption as COCO's evaluation counts them: Penn Treebank tokens, lower case, no punctuation.

The published CIDEr and BLEU are computed on the output of Stanford's PTBTokenizer 3.4.1, a Java program. This is
the part of its rules that English captions meet, in Python; docs/evaluate.md says on how many lines the two agree.
Its oddities are kept, because scores depend on them: brackets stay as words (``-lrb-``), "?!" and "!!" stay too,
pounds become ``#`` and euros ``$``.
"""

import html
import re

# pycocoevalcap's list of what is thrown away. Its "-LRB-" never meets the lower-case token, so brackets stay.
_PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", ";"}
# Longer runs end as "..." or "--", which that list has.
_RUN = re.compile(r"\.{2,}|-{2,4}")

# Characters that the tokenizer writes otherwise.
_REWRITTEN = str.maketrans(
    {
        "\u2018": "`", "\u2019": "'", "\u201b": "'", "\u201c": "``", "\u201d": "''", "\u2013": "--",
        "\u2014": "--", "\u2026": "...", "\u00a3": "#", "\u20ac": "$", "\u00bd": "1/2", "\u00bc": "1/4",
        "\u00be": "3/4", "\u00a0": " ", "\u00ad": "", "\u00a2": "cents",
        "(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- ", "{": " -lcb- ", "}": " -rcb- ",
    }
)  # fmt: skip

# Words that are divided without an apostrophe.
_DIVIDED = {
    "cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na"),
    "lemme": ("lem", "me"), "gimme": ("gim", "me"), "'tis": ("'t", "is"), "'twas": ("'t", "was"),
}  # fmt: skip

# Abbreviations that keep their full stop wherever they stand, and those that keep it before a number alone.
_ABBREVIATIONS = (
    r"mr|mrs|ms|messrs|mme|dr|drs|prof|sr|jr|st|ft|mt|gen|col|lt|sgt|capt|maj|cmdr|rev|hon|gov|sen|rep|pres|supt"
    r"|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri"
    r"|ave|blvd|rd|bldg|inc|co|cos|corp|ltd|bros|plc|etc|vs|al|adm|assn|dept|ph\.d|univ|est"
    r"|ariz|calif|colo|conn|fla|ind|kan|mich|minn|neb|nev|okla|penn|tenn|va|vt|wis"
)
_BEFORE_NUMBERS = r"no|nos|art|fig|pp|sec|p"

_WORD = r"[^\W_](?:[^\W]|[\u0300-\u036f])*"
_INSIDE_WORDS = r"[-/&_.]|'(?!(?:s|m|d|re|ve|ll|t)\b)(?=[a-z]{2})"
# The first alternative that fits, counts.
_TOKEN = re.compile(
    rf"""
      (?:https?|ftp)://[^\s"<>|()-]*[^\s"<>|().,;:!?'-](?:-[^\s"<>|().,;:!?'-]+)*
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+                          # someone@example.com
    | </?[a-z][^<>\s]*/?>                                   # <b>
    | -[lr][rsc]b-                                          # a bracket, by now
    | '(?:tis|twas)\b
    | 'n'(?=\s|[a-z])                                       # rock 'n' roll
    | '\d\ds?\b                                             # the '90s
    | (?:[a-z]\.){{2,}}(?:[a-z](?![\w'-]))?                 # u.s., p.m.
    | [a-z]\.(?=\s|$)                                       # an initial
    | (?:{_ABBREVIATIONS})\.(?=\s|$)
    | (?:{_BEFORE_NUMBERS})\.(?=\s*\d)
    | [a-z]+\.(?=,)                                         # no sentence ends before a comma
    | n't\b
    | '(?:s|m|d|re|ve|ll)(?![^\W_])
    | o'[a-z]{{2,}} | ma'am | d'(?:oh|[a-z]{{3,}}) | l'[a-z]{{2,}} | y'(?=all\b)
    | [a-z]+(?=n't\b)
    | c\+\+ | [cf]\#
    | [+-]?\d*(?:[.,:]?\d)+(?:/\d+)?(?![\w.-]|[-/&]\w)      # 1,000, 5:30, -5, .5
    | \d+/\d+
    | \d+\.\d+(?=[a-z])                                     # 2.5mph
    | (?:us|c|a|p|s)?\$
    | {_WORD}(?:(?:{_INSIDE_WORDS})\w+)*                    # black-and-white, man/woman, at&t
    | \.{{2,}} | --+ | [!?]+ | `` | ''
    | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)


def caption_words(caption: str) -> list[str]:
    """Return a caption's words, as the published evaluation counts them."""
    text = " ".join(html.unescape(caption).translate(_REWRITTEN).lower().replace('"', " '' ").split())
    words: list[str] = []
    for token in _TOKEN.findall(text):
        words.extend(_DIVIDED.get(token, (token,)))
    return [word for word in words if word not in _PUNCTUATION and not _RUN.fullmatch(word)]
