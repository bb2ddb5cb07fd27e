"""What the words of a question say about its numbers: the constants they license, names, units, decisions.

The tables are generous where generosity means caution: a licensed constant that equals a number of the question makes
`perturb` freeze that number, so a word too many costs a few variants and never a wrong one.
"""

import itertools
import re
from fractions import Fraction

NUMBER = re.compile(r"(?<![\w.,])(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=\d)(?![.,]?\d)")
PERCENT = re.compile(r"\s?(?:%|percent)")
CENTS = re.compile(r"\s?(?:cents?\b|\u00a2)")

_DAYS = "mon|tues|wednes|thurs|fri|satur|sun"
_MONTHS = (
    "jan(?:uary)?|feb(?:ruary)?|march|april|may|june|july|aug(?:ust)?|sept(?:ember)?|oct(?:ober)?|nov(?:ember)?"
    "|dec(?:ember)?"
)
_LICENCES = [(re.compile(rf"\b(?:{words})", re.I | re.S), [Fraction(x) for x in constants.split()]) for words, constants in (
    ("half|halves|halfway|midway|semi", "2 1/2"), ("twice|doubl|both|pairs?\\b|couples?\\b|twins?\\b|either|bicycle", "2"),
    ("each other|second|average|round.?trip|and back|parents|biweekly|mirror", "2"),
    ("eyes?\\b|ears?\\b|hands?\\b|arms?\\b|wings?\\b|shoes?\\b|socks?\\b|gloves?\\b", "2"),
    ("tripl|thrice|third|tricycle|triang", "3 1/3 2 2/3"), ("quadrupl|quarter|fourth", "4 1/4 3/4 3"),
    ("squares?\\b|rectang|perimeter|tires?\\b|wheels?\\b|legs?\\b|corners?\\b|cars?\\b", "4 2"),
    ("fifth", "5 1/5 4/5 4"), ("sixth", "6 1/6 5/6 5"), ("seventh", "7 1/7 6/7 6"), ("eighth", "8 1/8 7/8 7"),
    ("ninth", "9 1/9 8/9 8"), ("tenth", "10 1/10 9/10 9"), ("dozen", "12"), ("once|single|another|one\\b", "1"),
    ("(?:him|her|my|your)self|themselves|ourselves|including", "1"),
    ("seconds?\\b|minutes?\\b", "60 3600"), ("hours?\\b|hourly", "24"),
    (f"weeks?\\b|weekly|(?:{_DAYS})day", "7"), (f"week-?days?|week-?ends?|(?:{_DAYS})day|school|work ?day", "5 2"),
    ("(?=.*week)(?=.*month)", "4"), ("(?=.*week)(?=.*(?:year|annual))", "52"), ("(?=.*da(?:y|ily))(?=.*year)", "365"),
    ("months?\\b|monthly|season", "12"), (f"months?\\b|monthly|{_MONTHS}", "28 29 30 31"), ("decades?", "10"),
    ("foot|feet|ft\\b|inch|inches", "12"), ("yards?\\b|feet|foot", "3"), ("miles?\\b", "5280 1.6"),
    ("pounds?\\b|lbs?\\b|ounces?\\b|oz\\b", "16 2.2"), ("tons?\\b", "2000"), ("gallons?|quarts?|pints?|cups?", "2 4 8 16 32 128"),
    ("kilo|km|kg|met(?:er|re)|lit(?:er|re)|grams?\\b|mg\\b|ml\\b|milli", "1000 2.2 1.6"), ("cm\\b|centi|met(?:er|re)", "100 2.54"),
    ("cents?\\b|penn(?:y|ies)|dimes?\\b|nickels?\\b|quarters?\\b|coins?\\b|change\\b", "100 25 10 5 1 .25 .1 .05 .01"),
    ("percent", "100 1"), ("centur", "100"), ("score", "20"), ("cards?\\b|deck", "52"), ("hundred", "100"),
    ("thousand", "1000"), ("million", "1000000"), ("circ|diameter|radius|\\bpi\\b", "3.14 2"), ("alphabet", "26 5"),
    ("legs?\\b|spider|octop|insect", "6 8"), ("fingers?|toes?\\b", "5 10"), ("innings?|baseball", "9"), ("dice|die\\b", "6"),
)]  # fmt: skip
_ONES = dict(zip(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen".split(), range(1, 20), strict=True,
))  # fmt: skip
_TENS = dict(zip("twenty thirty forty fifty sixty seventy eighty ninety".split(), range(20, 100, 10), strict=True))
_SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000}
_PARTS = "half third fourth fifth sixth seventh eighth ninth tenth".split()
_WORD = re.compile(rf"\b(?:{'|'.join([*_TENS, *sorted(_ONES, key=len, reverse=True)])})", re.I)

_NAME_BEFORE = re.compile(
    rf"(?:[/:#\u00d7\u2013-]\s?|\b(?:{_MONTHS}|grade|size|level|chapter|page|route|channel|room|number|no\.|day|week|year"
    r"|ages?|aged|door|house|model|type|version|phase|stage|step|at|since|ratio of)\s|\d\s?(?:to|until|through)\s)$",
    re.I,
)
_NAME_AFTER = re.compile(
    r"(?!(?:kg|km|cm|mm|ml|mg|g|m|l|lbs?|ft|oz|mph|gb|mb|in)\b)[A-Za-z]|\s?[/:\u00d7\u2013]|\s?-\s?\d|-(?:in|for|to)-"
    rf"|\s?(?:a\.?m\b|p\.?m\b|o['\u2019]clock|noon|BC|AD)|\s(?:to|until|through|and)\s\d+[/:]|\sto\s\$?\d|\s\d+/\d"
    rf"|\s(?:halves|thirds|fourths|fifths|(?:{_MONTHS})\b)"
    r"|\s(?:\w+\s)?(?:legs?|wheels?|eyes?|arms?|fingers|toes|wings?|sides|tires)\b",
    re.I,
)
_CEILINGS = [(re.compile(rf"[\s-]?(?:{unit})", re.I), ceilings) for unit, ceilings in (
    (r"%|percent", (99,)), (r"(?:\w+[\s-])?hours?\b", (12, 24)), (r"(?:\w+[\s-])?(?:minutes?|seconds?)\b", (60,)),
    (r"times\s(?:a|per|each|every)\sweek|(?:\w+[\s-])?days?\b", (7, 30, 365)), (r"(?:\w+[\s-])?weeks?\b", (4, 52)),
    (r"(?:\w+[\s-])?months?\b", (12,)), (r"years?[\s-]?old|years? of age", (18, 100)), (r"(?:ft|feet|foot)\stall", (8,)),
)]  # fmt: skip
_DECISIONS = re.compile(
    r"\b(?:which|who|whichever|whoever|(?:slow|fast|cheap|larg|small|bigg|great|high|low|heavi|quick)(?:er|est)|better|best"
    r"|worst|most|least|max|maximum|minimum|limit|exceed\w*|first|above|below|under|up to|until|only|capacity|hold|fits?"
    r"|enough|overtime|(?:over|than|past|after|beyond) \$?\d)\b",
    re.I,
)


def constants(question: str) -> set[Fraction]:
    """The constants that the words of a question license: number words and fractions, half, twice, units, percent."""
    found = {value for pattern, values in _LICENCES if pattern.search(question) for value in values}
    found |= {Fraction(x) for x in (100, 1) if "%" in question or "\u00a2" in question}
    words = [(m[0].lower(), m.start(), m.end()) for m in _WORD.finditer(question)]
    for (word, _, end), (following, start, _) in itertools.pairwise([*words, ("", -1, -1)]):
        value = (_TENS | _ONES)[word]
        found.add(Fraction(value))
        if word in _TENS and following in _ONES and 0 < start - end <= 1:
            found.add(Fraction(value + _ONES[following]))
        if scale := re.match(rf"[\s-]({'|'.join(_SCALES)})", question[end:], re.I):
            found.add(Fraction(value * _SCALES[scale[1].lower()]))
        if part := re.match(rf"[\s-]({'|'.join(_PARTS)}|halve|quarter)", question[end:], re.I):
            name = {"halve": "half", "quarter": "fourth"}.get(part[1].lower(), part[1].lower())
            found |= _share(value, _PARTS.index(name) + 2)
    for top, bottom in re.findall(r"(\d+)\s?/\s?(\d+)", question):
        found |= _share(int(top), int(bottom))
    return found


def _share(top: int, bottom: int) -> set[Fraction]:
    """What "3/4" or "three quarters" licenses: 3, 4 and 3/4, and of the rest 1 and 1/4."""
    found = {Fraction(top), Fraction(bottom)}
    return found | {Fraction(bottom - top), Fraction(top, bottom), 1 - Fraction(top, bottom)} if top < bottom else found


def is_name(before: str, number: str, after: str) -> bool:
    """Whether a number names something (a date, a time, an ordinal, a fraction, a year) or states a fact of anatomy."""
    if re.fullmatch(r"1[5-9]\d\d|20\d\d", number) and re.search(r"(?:^|[a-z,(]\s|\()$", before):
        return True
    return bool(_NAME_BEFORE.search(before) or _NAME_AFTER.match(after))


def ceiling(value: Fraction, after: str) -> int | None:
    """The natural ceiling of a value by the unit that follows it, such as 24 for hours; None without one."""
    limits = next((limits for pattern, limits in _CEILINGS if pattern.match(after)), ())
    return next((limit for limit in limits if value <= limit), None)


def decides(question: str) -> bool:
    """Whether the chain may hang on which of two quantities is larger: "the slower one", "at most 40", "after 8 hours"."""
    return _DECISIONS.search(question) is not None


def article(before: str) -> str | None:
    """The "a" or "an" right before a number, as in "an 8-foot pole"."""
    match = re.search(r"\b(an?)\s$", before, re.I)
    return match and match[1].lower()


def takes_an(whole: int) -> bool:
    """Whether a number is read with a vowel first: 8, 11, 18, 80, 11,000."""
    digits = str(whole)
    return digits[0] == "8" or (digits[:2] in ("11", "18") and len(digits) % 3 == 2)
