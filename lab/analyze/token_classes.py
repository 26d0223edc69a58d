"""What kind of word a token belongs to: punctuation, digits, function words, content words, white space, start of document.

Works on the bytes of the tokens, so for GPT-2's tokens (which carry the space before a word) and for single bytes alike.
English; a word of another language counts as a content word.
"""

import re

import numpy as np

from text.tokenizer import Tokenizer

CLASSES = ("punctuation", "digits", "function words", "content words", "white space", "start of document")
PUNCTUATION, DIGITS, FUNCTION, CONTENT, SPACE, START = range(len(CLASSES))

# Determiners, pronouns, prepositions, conjunctions, auxiliaries, and adverbs of grammar and degree: the closed classes
_CLOSED = """
a about above across after again against albeit all almost along already also although always am amid among amongst an and
another any anybody anyone anything are around as at be because been before behind being below beneath beside besides
between beyond both but by can cannot could despite did do does doing done down during each either else enough even ever
every everybody everyone everything except few for from further had has have having he hence her here hers herself him
himself his how however i if in inside instead into is it its itself just least less lest like many may me might mine more
moreover most much must my myself near neither never nevertheless no nobody none nonetheless nor not nothing now of off
often on once one only onto or other others otherwise ought our ours ourselves out outside over own past per perhaps quite
rather same shall she should since so some somebody someone something soon still such than that the their theirs them
themselves then thence there thereby therefore these they this those though through throughout thus till to together too
toward towards under underneath unless unlike until up upon us versus very via was we were what whatever when whence
whenever where whereas whereby wherever whether which whichever while who whoever whole whom whose why will with within
without would yet you your yours yourself yourselves
"""
FUNCTION_WORDS = frozenset(_CLOSED.split())

QUOTES = re.compile(rb"\xe2\x80[\x98\x99]")  # ‘ and ’
# In UTF-8, E2 80 … and E2 81 … are dashes, quotes and the like, C2 A0 is the no-break space; other non-ASCII bytes are letters
UNIT = re.compile(
    rb"(?P<space>(?:\s|\xc2\xa0)+)"
    rb"|(?P<digits>[0-9][0-9A-Za-z]*(?:[.,][0-9]+)*)"
    rb"|(?P<mark>\xe2[\x80\x81][\x80-\xbf]|[^\sA-Za-z0-9\x80-\xff])"
    rb"|(?P<word>(?:(?!\xe2[\x80\x81]|\xc2\xa0)[A-Za-z0-9\x80-\xff])+(?:(?:'|\xe2\x80\x99)[A-Za-z]+)*)"
)
KINDS = {"space": SPACE, "digits": DIGITS, "mark": PUNCTUATION}


def classify(ids: list[int], tokenizer: Tokenizer) -> np.ndarray:
    """The class of each of consecutive tokens, (n,) int8, as an index into CLASSES.

    A token has the class of the first word, number or mark that it has a part of, and is white space where there is none.
    """
    found = np.full(len(ids), SPACE, dtype=np.int8)
    starts = [i for i, token in enumerate(ids) if token == tokenizer.eot]
    found[starts] = START
    for first, end in zip([0, *(i + 1 for i in starts)], [*starts, len(ids)], strict=True):
        if first < end:
            found[first:end] = _document([tokenizer.decode_bytes([token]) for token in ids[first:end]])
    return found


def _document(tokens: list[bytes]) -> np.ndarray:
    """The classes of the tokens of a document or of a part of one."""
    text = b"".join(tokens)
    class_at = np.full(len(text), SPACE, dtype=np.int8)
    for unit in UNIT.finditer(text):
        class_at[slice(*unit.span())] = KINDS.get(unit.lastgroup or "", -1) if unit["word"] is None else of_word(unit["word"])
    at, found = 0, np.empty(len(tokens), dtype=np.int8)
    for i, token in enumerate(tokens):
        own = class_at[at : at + len(token)]
        visible = own[own != SPACE]
        found[i] = visible[0] if len(visible) else SPACE
        at += len(token)
    return found


def of_word(word: bytes) -> int:
    """FUNCTION or CONTENT; a contraction (it's, don't) is what its first part is, that of a name (Ann's) a content word."""
    text = QUOTES.sub(b"'", word).decode(errors="replace").lower()
    if text.endswith("n't"):
        return FUNCTION
    return FUNCTION if text.partition("'")[0] in FUNCTION_WORDS else CONTENT
