"""Texts as they are read, out of texts as web pages write them."""

import html
import re

# Others with a final semicolon only: html.unescape alone makes "?a=1&copy=2" a copyright sign.
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
_ATTRIBUTES = r"(?:\s+[\w:.-]{1,40}\s?=\s?(?:\"[^\"<>]{0,999}\"|'[^'<>]{0,999}'|[^\s\"'<>]{1,999}))"
_INLINE = (
    "a|abbr|b|big|cite|code|del|em|font|i|ins|kbd|mark|q|s|small|span|strike|strong|sub|sup|tt|u"
)
_BLOCK = (
    "article|blockquote|body|br|center|dd|div|dl|dt|figure|figcaption|footer|h[1-6]|head|header"
    "|hr|html|iframe|img|li|main|ol|p|pre|section|table|tbody|td|tfoot|th|thead|title|tr|ul|wbr"
)


def _tags(names: str) -> re.Pattern:
    return re.compile(rf"</?(?:{names}){_ATTRIBUTES}{{0,20}}\s?/?>", re.IGNORECASE)


_INLINE_TAG, _BLOCK_TAG = _tags(_INLINE), _tags(_BLOCK)
_COMMENT = re.compile(r"<!--.{0,999}?-->", re.DOTALL)
_DEEPEST = 4  # what is escaped more often than this is no accident


def without_markup(text: str) -> str:
    """`text` with HTML's entities undone, as often as they were escaped, and its tags taken out.

    Only what is a tag of HTML is one: "a < b", "5 > 3" and "<AAPL>" stay. A tag inside a word
    leaves no gap (`<b>App</b>le`), one that ends a line or a paragraph leaves a space.
    """
    for _ in range(_DEEPEST):
        before = text
        text = _COMMENT.sub("", text)
        text = _INLINE_TAG.sub("", _BLOCK_TAG.sub(" ", text))
        text = _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
        if text == before:
            break
    return text
