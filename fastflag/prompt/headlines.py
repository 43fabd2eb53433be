"""News as a prompt may show it: one sentence of an untrusted text, without names and dates."""

import re
import unicodedata
from collections.abc import Callable, Sequence

from fastflag.prompt.markup import without_markup

_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
_NOT_TEXT = re.compile("[\\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
_SENTIMENT = re.compile(r"\s*\(sentiment:\s*(\w+)\)$", re.IGNORECASE)
# A full stop sooner than this is an abbreviation's more often than a sentence's.
_SENTENCE = re.compile(r"(.{40,}?[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z])")
_HEADLINE_CHARACTERS = 400  # several times what HEADLINE_TOKENS hold

# Names by which a company is known in news, as beginnings of words.
COMPANY_NAMES = {
    "AAPL": ("apple",),
    "MSFT": ("microsoft",),
    "IBM": ("ibm", "international business machines"),
    "GOOG": ("googl", "alphabet"),
    "FB": ("facebook", "meta platforms"),
    "JNJ": ("johnson & johnson", "j&j"),
    "UVV": ("universal corp", "universal leaf"),
    "HON": ("honeywell",),
    "TSLA": ("tesla", "elon musk", "musk"),
    "BTC": ("bitcoin", "btc", "xbt"),
    "ETH": ("ethereum",),
}
OWN_NAME, OTHER_NAME = "the asset", "another asset"

_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sep(?:t(?:ember)?)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
_YEAR = r"(?:19|20)\d\d"
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_DATES = [
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (rf"(?<!\d){_YEAR}[-/.]\d{{1,2}}[-/.]\d{{1,2}}(?!\d)", "a date"),
        (r"(?<!\d)\d{1,2}[-/.]\d{1,2}[-/.](?:\d{4}|\d{2})(?!\d)", "a date"),
        (rf"(?<!\d){_YEAR}\d{{4}}(?!\d)", "a date"),
        (rf"\b{_MONTH}\s*{_DAY}\b(?:\s*,?\s*{_YEAR})?", "a date"),
        (rf"\b{_DAY}\s+(?:of\s+)?{_MONTH}(?!\w)(?:\s*,?\s*{_YEAR})?", "a date"),
        (rf"\b{_MONTH}\s*(?:,|of)?\s*['\u2019]?(?:{_YEAR}|\d\d\b)", "a month"),
        (rf"\b(?:FY|[QH][1-4]|[1-4][QH])\s?(?:of\s)?['\u2019]?(?:{_YEAR}|\d\d)\b", "a period"),
        (rf"(?<!\d){_YEAR}(?:\s?[-\u2013/]\s?\d{{2,4}})?(?!\d)", "a year"),
    )
]


def anonymiser(symbol: str, others: Sequence[str]) -> Callable[[str], str]:
    """A function of a text that takes out `symbol`, its names, `others` and theirs, and all dates.

    Names are those in `COMPANY_NAMES`; products and people that point to a company are not known.
    """
    own = _name_pattern([symbol])
    other = _name_pattern([*others, *COMPANY_NAMES])

    def replace(text: str) -> str:
        text = other.sub(OTHER_NAME, own.sub(OWN_NAME, text))
        for pattern, replacement in _DATES:
            text = pattern.sub(replacement, text)
        return text

    return replace


def _name_pattern(symbols: Sequence[str]) -> re.Pattern:
    alternatives = []
    for symbol in symbols:
        base = re.split(r"[-/.]", symbol)[0]
        for ticker in filter(None, (symbol, base)):
            # Short tickers are words in small letters (ALL, NOW).
            flag = "i" if len(ticker) >= 4 else "-i"
            alternatives.append(rf"(?{flag}:\$?{re.escape(ticker)})(?![^\W_])")
        alternatives += [re.escape(name) + r"\w*" for name in COMPANY_NAMES.get(base.upper(), ())]
    return re.compile(rf"(?<![^\W_])(?:{'|'.join(alternatives)})", re.IGNORECASE)


def headline(text: str, anonymise: Callable[[str], str] | None = None) -> str:
    """The first sentence of an untrusted text as one line without markup or control characters.

    A sentiment that InvestorBench's files put at the end is moved to the front.
    """
    text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", without_markup(text)))
    text = _NOT_TEXT.sub(" ", text).strip()
    sentiment = _SENTIMENT.search(text)
    if sentiment:
        text = f"{sentiment[1]}: {text[: sentiment.start()]}"
    text = text[:_HEADLINE_CHARACTERS]
    if anonymise is not None:
        text = anonymise(text)
    sentence = _SENTENCE.match(text)
    return (sentence[1] if sentence else text).rstrip(" .,;:|")
