"""What the words of a question say about its numbers: licensed constants, names, units, decisions.

The tables are cautious: a number that equals a licensed constant is frozen, so a superfluous word
costs a few variants and never gives a wrong one.
"""

import itertools
import re
from fractions import Fraction

NUMBER = re.compile(  # up to 12 digits, with separators and decimals; not a part of something longer
    r"(?<![\w.,])(?:[0-9]{1,3}(?:,[0-9]{3}){1,3}|[0-9]{1,12})?(?:\.[0-9]{1,6})?(?<=[0-9])(?![.,]?\d)"
)
PERCENT = re.compile(r"\s?(?:%|percent)")
CENTS = re.compile(r"\s?(?:cents?\b|¢)")
ARTICLE = re.compile(r"\b(an?)\s$", re.I)  # right before a number, as in "an 8-foot pole"


def _pattern(*alternatives: str, end: str = "") -> re.Pattern:
    return re.compile(f"(?:{'|'.join(alternatives)}){end}", re.I)


_DAYS = r"(?:mon|tues|wednes|thurs|fri|satur|sun)days?"
_MONTHS = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|march|april|may|june|july|aug(?:ust)?|sept(?:ember)?|oct(?:ober)?|nov(?:ember)?"
    r"|dec(?:ember)?)"
)
_PARTS = "half third fourth fifth sixth seventh eighth ninth tenth".split()
# Constants | words that license them; with several patterns, the question must match each. "~": too
# weak to explain a literal, but reason enough to freeze a number of that value.
_TABLE = rf"""
2 1/2 1         | half|halves|halfway|midway
2               | twice|doubl\w*|both|pairs?|couples?|twins?|either|bicycles?|motorcycles?|bikes?|round.?trip
2               | second|average|each other|and back|to and from|(?:one|each|either|other) way|eyes
2               | ears?|wings?|shoes?|diameter|radius
2 4             | rectang\w*|perimeter|legs?|wheels?|tires?
4               | squares?|square-shaped|corners?|seasons?|quadrupl\w*
3               | tripl\w*|thrice|tricycles?|triang\w*
1               | once|single|another|one|(?:him|her|my|your)self|themselves|ourselves|including|percent|first|last
6 8             | legs?|spiders?|octop\w*|insects?|ants?
10              | decades?
100             | century|centuries|hundreds?
100 1 .01       | percent|percentage
1000            | thousands?
1000000         | millions?
60 3600         | minutes?|seconds?
24              | hours?|hourly
7               | weeks?|weekly|{_DAYS}
2 5             | weekdays?|weekends?|week-\w+|{_DAYS}
5               | work ?days?|school
4               | weeks?|weekly|workweek | months?|monthly
52              | weeks?|weekly | years?|yearly|annual\w*
365             | days?|daily | years?|yearly
12              | months?|monthly|dozens?
30              | days?|daily|nights? | months?|monthly|april|june|september|november
31              | days?|daily|nights? | january|march|may|july|august|october|december
28              | days?|daily|nights? | february
12              | feet|foot|ft|inch\w*
3               | yards? | feet|foot|ft
5280            | miles? | feet|foot
16              | pounds?|lbs? | ounces?|oz
2000            | tons? | pounds?
4               | gallons? | quarts?
8               | gallons? | pints?
16              | gallons? | cups?
128             | gallons? | ounces?
32              | quarts? | ounces?
2               | quarts? | pints?
4               | quarts? | cups?
2               | pints? | cups?
8               | cups? | ounces?
1000            | kilo\w*|km|kg|met(?:er|re)s?|lit(?:er|re)s?|grams?|mg|ml|milli\w*
100             | cm|centi\w* | met(?:er|re)s?
100 .01         | cents?|penny|pennies
10 .1           | dimes?
5 .05           | nickels?
25 .25          | quarters?
3.14            | circ\w*|pi
~2              | hands?|arms?|socks?|gloves?|parents?|cars?|biweekly|semi\w*|school
~2.2 1.6 2.54   | kilo\w*|km|kg|cm|centi\w*|miles?
~28 29 30 31    | months?|monthly|days?|{_MONTHS}
~5 10           | fingers?|toes?
~26             | alphabet|letters?
~52             | cards?|deck
~9 6            | innings?|baseball|dice|die
~16 12 3 1000   | pounds?|feet|foot|yards?|miles?|ounces?
~2 4 8 16 32 128 | gallons?|quarts?|pints?|cups?
~100            | degrees?|dollars?|met(?:er|re)s?
"""
_FRACTIONS = [
    f"{n} 1/{n} {n - 1} {n - 1}/{n} {1 if n < 6 else ''} | {part}s?{'|quarters?' if n == 4 else ''}"
    for n, part in enumerate(_PARTS[1:], 3)
]
_LICENCES = [
    (
        [re.compile(rf"\b(?:{words.strip()})\b", re.I) for words in patterns],
        {Fraction(value) for value in constants.strip(" ~").split()},
        not constants.startswith("~"),
    )
    for constants, *patterns in (re.split(r"\s\|\s", line) for line in [*_TABLE.strip().splitlines(), *_FRACTIONS])
]
_TEENS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
_ONES = {word: i for i, word in enumerate(f"{_TEENS} eighteen nineteen".split(), start=1)}
_TENS = dict(zip("twenty thirty forty fifty sixty seventy eighty ninety".split(), range(20, 100, 10), strict=True))
_SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000}
_WORD = re.compile(rf"\b(?:{'|'.join([*_TENS, *sorted(_ONES, key=len, reverse=True)])})", re.I)

_NAMES = (
    rf"{_MONTHS}|grade|size|level|chapter|page|route|channel|room|number|no\.|day|week|year|ages?|aged|door|house|model"
    "|type|version|phase|stage|step|at|since|ratio of"
)
_BODY = "legs?|wheels?|eyes?|arms?|fingers|toes|wings?|sides|tires|teeth|heads?|degrees?"
_MONEY = "bills?|coins?|bank-?notes?|notes?|pieces?"
_GLUED = r"(?:kg|km|cm|mm|ml|mg|g|m|l|lbs?|ft|oz|mph|gb|mb|in)\b"  # units that may touch their number
_MEASURE = (
    r"inch(?:es)?|feet|foot|yards?|miles?|pounds?|ounces?|kilo\w+|kg|grams?|(?:centi|milli)?(?:meters?|liters?)|quarts?"
    r"|[kmgt]b|\w+bytes?"
)
_NAME_BEFORE = _pattern(
    r"(?:^|\s)(?:these|those|all|the other|the remaining|equals?|equal to|equivalent to)\s\$?",  # counted elsewhere
    rf"\b(?:{_MONEY}) of\s\$?",
    rf"(?:\d|\b(?:{'|'.join(_ONES)}))\s\$",  # two $20 bills
    rf"\b(?:{_MEASURE}|gallons?|pints?|cups?) (?:is|are|has|have|contains?)\s",  # 1 yard is 3 feet
    r"[/:#×–-]\s?",
    rf"\b(?:{_NAMES})\s",
    r"\d\s?(?:to|until|through)\s",
    end="$",
)
_NAME_AFTER = _pattern(
    rf"(?!{_GLUED})[A-Za-z]",
    r"\s?[/:×–]|\s?-\s?\d|-(?:in|for|to)-",
    r"\s?(?:a\.?m\b|p\.?m\b|o['’]clock|noon|BC|AD)",
    r"\s(?:to|until|through|and)\s\d+[/:]|\sto\s\$?\d|\s\d+/\d",
    rf"\s(?:halves|thirds|fourths|fifths|(?:{_MONTHS}|{_DAYS})\b)",
    rf"\s(?:\w+\s)?(?:{_BODY})\b|\s?°",
    r"(?-i:\s\w+(?:\s\w+)?\s?[,:;]\s(?:named\s)?[A-Z]\w+(?:,\s[A-Z]\w+)*,?\sand\s[A-Z])",  # 2 cats: Ann and Cy
    rf"[\s-]?(?:dollars?|cents?|[€£¢])?[\s-]?(?:{_MONEY})\b",
    rf"\s?(?:{_MEASURE}) (?:per|in an?|in one|in each|in every|to an?) (?:{_MEASURE}|gallons?|pints?|cups?)\b",
)
_CEILINGS = {
    r"\s?(?:%|percent)": (99,),
    r"[\s-](?:\w+[\s-])?hours?\b": (12, 24),
    r"[\s-](?:\w+[\s-])?(?:minutes?|seconds?)\b": (60,),
    r"\stimes\s(?:a|per|each|every)\sweek|[\s-](?:\w+[\s-])?days?\b": (7, 30, 365),
    r"[\s-](?:\w+[\s-])?weeks?\b": (4, 52),
    r"[\s-](?:\w+[\s-])?months?\b": (12,),
    r"[\s-]years?(?:[\s-]?old| of age)": (12, 18, 25, 35, 50, 70, 100),
    r"\s(?:ft|feet|foot)\stall": (8,),
    r"\s?(?:mph|miles (?:per|an) hour)": (12, 30, 80),
    r"\sinches\stall": (84,),
    r"\s?(?:cm|centimeters?)\b": (200,),
}
_WHOLES = {"%|percent|cents?": 100, "minutes?|seconds?": 60, "months?": 12, "hours?": 24, "days?": 7, "weeks?": 52}
# Numbers and results up to 100 should stay there: marks, ages, a percentage that is asked for.
UP_TO_100 = _pattern(r"\b(?:test|quiz|exam|grade|years? old|years? of age|ages?\b|how old|older|younger|what percent)")
# The chain may depend on which quantity is larger: "the slower one", "at most 40", "after 8 hours".
DECISION = _pattern(
    r"\b(?:which|who|whichever|whoever|better|best|worst|most|least|max|maximum|minimum|limit|exceed\w*|first|above|below)\b",
    r"\b(?:slow|fast|cheap|larg|small|bigg|great|high|low|heavi|quick)(?:er|est)\b",
    r"\b(?:under|up to|until|only|capacity|hold|fits?|enough|overtime|(?:over|than|past|after|beyond) \$?\d)",
)


def constants(question: str) -> tuple[set[Fraction], set[Fraction]]:
    """(constants that the words of a question license, these and weaker ones that freeze a number)."""
    matched = [row for row in _LICENCES if all(pattern.search(question) for pattern in row[0])]
    found = {value for _, values, strong in matched if strong for value in values}
    found |= {Fraction(x) for x in ("100", "1", ".01") if "%" in question or "¢" in question}
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
    for top, bottom in re.findall(r"\b([0-9]{1,6})\s?/\s?([0-9]{1,6})\b", question):
        found |= _share(int(top), int(bottom))
    return found, found.union(*[values for _, values, _ in matched])


def _share(top: int, bottom: int) -> set[Fraction]:
    """What "3/4" or "three quarters" licenses: 3, 4 and 3/4, and of the rest 1 and 1/4."""
    found = {Fraction(top), Fraction(bottom)}
    return found | {Fraction(bottom - top), Fraction(top, bottom), 1 - Fraction(top, bottom)} if top < bottom else found


def is_name(before: str, number: str, after: str) -> bool:
    """Whether a number is a name (date, time, ordinal, fraction, year) or a fact of anatomy."""
    year = re.fullmatch(r"1[5-9]\d\d|20\d\d", number) and re.search(r"(?:^|[a-z,(]\s|\()$", before)
    return bool(year or _NAME_BEFORE.search(before) or _NAME_AFTER.match(after))


def ceiling(value: int | Fraction, after: str) -> int | None:
    """The natural ceiling of a value by the unit after it, such as 24 for hours, or None."""
    limits = next((limits for unit, limits in _CEILINGS.items() if re.match(unit, after, re.I)), ())
    return next((limit for limit in limits if value <= limit), None)


def whole(after: str) -> int | None:
    """The whole that a number is a part of by the unit after it: 100 for percent, or None."""
    return next((whole for unit, whole in _WHOLES.items() if re.match(rf"[\s-]?(?:{unit})", after, re.I)), None)


def takes_an(whole: int) -> bool:
    """Whether a number is read with a vowel first: 8, 11, 18, 80, 11,000."""
    return re.match(r"8|1[18](\d{3})*$", str(whole)) is not None


def skeleton(question: str) -> str:
    """A question without numbers, names and genders, which copies and their original share."""
    text = _WORD.sub("#", NUMBER.sub("#", question))
    text = re.sub(r"\b(?:he|she|his|her|him|hers|himself|herself)\b", "they", text, flags=re.I)
    return " ".join(re.findall(r"\w+|#", re.sub(r"\b[A-Z]\w*", "Name", text)))
