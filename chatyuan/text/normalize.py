"""Chinese text normalisation: NFC and a width table, never NFKC.

NFKC turns ，！？：；（） into ASCII but leaves 。“” alone, so it makes mixed punctuation; it also
rewrites ㊣, ①, ½ and ℃. Here full-width letters and digits become ASCII, the ideographic space
becomes a space, invisible characters go, Kangxi radicals and compatibility ideographs become the
unified ones, and ASCII punctuation between Chinese characters becomes full-width.
"""

import re
import unicodedata


def _width_table() -> dict[int, str | None]:
    table: dict[int, str | None] = {}
    for code in range(0xFF01, 0xFF5F):
        character = chr(code - 0xFEE0)
        if character.isalnum():
            table[code] = character
    for code in (*range(0x2F00, 0x2FD6), *range(0xF900, 0xFAFF)):
        unified = unicodedata.normalize("NFKC", chr(code))
        if len(unified) == 1 and unified != chr(code):
            table[code] = unified
    table[0x3000] = table[0xA0] = " "
    for code in (0xAD, 0x200B, 0x200C, 0x200D, 0x200E, 0x200F, 0x2060, 0xFEFF):
        table[code] = None
    table[0x0D] = table[0x2028] = table[0x2029] = "\n"
    # Other control characters carry no text; newline and tab do.
    for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)):
        table.setdefault(code, None)
    table[0x0A], table[0x09] = "\n", "\t"
    return table


WIDTH_TABLE: dict[int, str | None] = _width_table()
_NEEDS_TABLE = re.compile(
    "[" + "".join(re.escape(chr(c)) for c in WIDTH_TABLE if chr(c) not in "\n\t") + "]"
)
_HAN = "\u3400-\u4dbf\u4e00-\u9fff"
_BETWEEN_HAN = re.compile(f"(?<=[{_HAN}])[ ]?([,?!:;()])[ ]?(?=[{_HAN}]|$)")
_FULL_WIDTH = dict(zip(",?!:;()", "，？！：；（）", strict=True))
_NOT_TEXT = re.compile(r"[\W_]+")


def normalize(text: str) -> str:
    """NFC, the width table, and full-width punctuation between Chinese characters."""
    text = unicodedata.normalize("NFC", text)
    if _NEEDS_TABLE.search(text):
        text = text.replace("\r\n", "\n").translate(WIDTH_TABLE)
    return _BETWEEN_HAN.sub(lambda match: _FULL_WIDTH[match.group(1)], text)


def fingerprint(text: str) -> str:
    """What must differ for two texts to differ: letters, digits and Han, width and case folded.

    Punctuation, whitespace, emoji and the width of characters are ignored.
    """
    return _NOT_TEXT.sub("", unicodedata.normalize("NFKC", text)).casefold()
