"""What IFEval counts in a text: sentences, words, words in capitals, and the language. Nothing is downloaded.

Not the instructions themselves (ifeval_checks.py).
"""

from __future__ import annotations

import re

from tunelet.errors import TuneletError

SEED = 0

# Abbreviations that end in a full stop without ending a sentence, as far as nltk's English model knows them. It doesn't
# know "e.g." and "i.e.": a sentence ends there, and a count that agrees with the official one has to say so too.
_SHORT = """mr mrs ms dr prof sen rep reps gen col lt maj adm messrs jr sr st ave inc ltd co cos corp bros vs ft yr mg
    ok jan feb aug sep sept oct nov dec tues wed fri ala ariz calif colo conn fla ga ill kan ky mich minn nev okla ore
    pa tenn va vt wash wis u.s u.k u.n u.s.a u.s.s.r n.y n.j n.c n.d n.h n.m d.c s.c l.a a.m p.m a.d a.c a.s s.a ph.d
    m.b.a l.p j.c j.k j.p r.j c d e f g h k l m n p r s t v w"""
# Words that begin a sentence after an abbreviation or an ellipsis: the first never stand capitalised inside one.
_OPEN = "her here indeed instead moreover nevertheless nor please so such though thus unlike which yes yet your"
_START = """according although among both but despite even he however i if in it many meanwhile most nonetheless sales
    separately similarly since some the there these they this under when while"""
# Words that are no names, for "Vitamin A. She" beside "A. Miller".
_PLAIN = """a after all an and another any as at because before by during each every for from his how its my no not now
    of on once only or our she that their then those to until we what where who why with you"""
_ABBREVIATIONS = frozenset(_SHORT.split())
_OPENERS = frozenset(_OPEN.split())
_STARTERS = _OPENERS | frozenset(_START.split())
_COMMON = _STARTERS | frozenset(_PLAIN.split())

_END = re.compile(r"[.?!](?=[?!)\";}\]*:@'({\[‘’“”«»]|$)")  # where a sentence may end in what stands between spaces
_CLOSING = re.compile(r"[\"')\]}‘’“”«»]+(?:\s+|(?=--)|$)")
_WORD = re.compile(r"[^\W\d_]+")

_APART = re.compile(r"[\"«»“”‘’„`;@#$%&?!\[\](){}<>*‒-―]|''|[:,](?!\d)|\.{2,}|--")
_CLITIC = re.compile(r"(?i)(?<=[^'\s])(n't|'(?:ll|re|ve|[smd]))(?=\s|$)")
_JOINED = re.compile(r"(?i)\b(can)(not)\b|\b(gim|lem)(me)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b")


def count_words(text: str) -> int:
    r"""Runs of `\w`, as nltk's RegexpTokenizer(r"\w+") of the official code counts them: "don't" is two.

    By Python's `re`, as nltk did when IFEval appeared. nltk 3.10 asks the `regex` package, whose `\w` holds the vowel
    signs of Hindi, Malayalam and the like: it counts fewer words in those scripts.
    """
    return len(re.findall(r"\w+", text))


def count_sentences(text: str) -> int:
    """Sentences, by the decisions of Punkt (Kiss and Strunk 2006), which the official code takes from nltk.

    Its English model is a download; here stand the abbreviations in common use and words that begin sentences. They
    can differ after initials ("J. Smith"), rare abbreviations, and "...": Punkt asks how the next word was written in
    the newspaper that it learned from. Measured once on 18,188 texts (Dolly, UltraFeedback, GSM8K, TinyStories), with
    that model in nltk 3.10.4: the same count for 99.6 %.
    As in Punkt a line break ends nothing: a list without full stops is one sentence, "1." before a capital is one.
    """
    if not text.strip():
        return 0
    tokens = list(re.finditer(r"\S+", text))
    count = 1
    for token, after in zip(tokens, [*tokens[1:], None], strict=True):
        ends = [found.end() for found in _END.finditer(token[0])]
        if after is None and ends[-1:] == [len(token[0])]:
            ends.pop()  # the text's own end
        if not ends:
            continue
        inside = token[0][ends[-1] :]
        following = inside or after[0]
        closing = _CLOSING.match(text, token.start() + ends[-1] if inside else after.start())
        more = bool(text[closing.end() :].strip()) if closing else True
        count += more and _ends(token[0][: ends[-1]], following, text)
    return count


def _ends(token: str, following: str, text: str) -> bool:
    """Does a sentence of `text` end with this token? A question or exclamation mark always ends it, a full stop
    mostly."""
    if token[-1] in "?!":
        return True
    word = re.split(r"[(\"`{\[:;&#*@)}\],?!“”«»]|--", token)[-1]
    if word.endswith(".."):
        return _capital(following) in _STARTERS
    kind = word[:-1].lower()
    if re.fullmatch(r"-?[\d.,]*\d", kind):  # "1. apples" goes on, "1. Apples" doesn't
        return not following[0].islower() and following[0] not in ";:,.!?"
    if kind in _ABBREVIATIONS or kind.rsplit("-", 1)[-1] in _ABBREVIATIONS:
        return _capital(following) in (_OPENERS if len(kind) == 1 else _STARTERS)
    if len(kind) == 1 and kind.isalpha():  # "J. Smith", but "Vitamin A. Apples" where apples are spoken of
        next_word = _capital(following)
        if next_word:
            return next_word in _COMMON or bool(re.search(rf"\b{next_word}\b", text))
        return not following[0].islower() and following[0] not in ";:,.!?"
    return True


def _capital(token: str) -> str:
    """The word that the token begins with, in small letters, if it is written with a capital one; else ""."""
    word = _WORD.match(token)
    return word[0].lower() if word and word[0][0].isupper() else ""


def count_capital_words(text: str) -> int:
    """Words without a small letter and with a capital one, cut as nltk's word_tokenize cuts (the Penn Treebank's way):
    at punctuation, brackets and quotes but not at "-", "/" and "." inside, and "DON'T" is DO and N'T."""
    text = _CLITIC.sub(r" \1", _APART.sub(" ", text))
    text = _JOINED.sub(lambda two: " ".join(part for part in two.groups() if part), text)
    return sum(word.isupper() for word in text.split())


def language(text: str) -> str | None:
    """ISO 639-1 code by langdetect, which the official code uses; None where the text has nothing to go by.

    langdetect draws at random: the seed is set anew for each text, so that a text's verdict never changes.

    Raises TuneletError where langdetect isn't installed.
    """
    try:
        from langdetect import DetectorFactory, LangDetectException, detect
    except ImportError as error:
        raise TuneletError(
            "the language of an answer can't be told: langdetect is not installed",
            why="IFEval's language and capital-letter instructions ask which language an answer is in",
            fix='pip install "tunelet[eval]"',
        ) from error
    DetectorFactory.seed = SEED
    try:
        return str(detect(text))
    except LangDetectException:
        return None
