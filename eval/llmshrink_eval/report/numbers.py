"""Numbers as people read them: as many digits as the interval supports, real minus signs, units that fit.

Everything returns plain text; a number that was not measured is an en dash.
"""

from __future__ import annotations

import math

NOT_MEASURED = "–"
_HUGE = 1e9
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def fixed(value: float | None, decimals: int) -> str:
    """`1,234.50`, with a true minus sign; nothing is ever `−0.0`, and from 1e9 on three digits are enough."""
    if value is None or math.isnan(value):
        return NOT_MEASURED
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if abs(value) >= _HUGE:
        return _scientific(value, 3)
    text = f"{abs(value):,.{decimals}f}"
    negative = value < 0 and any(digit in "123456789" for digit in text)
    return f"−{text}" if negative else text


def significant(value: float | None, digits: int = 3) -> str:
    """With so many significant digits; in powers of ten where it is tiny or huge."""
    if value is None or not math.isfinite(value) or value == 0:
        return fixed(value, 0)
    # Rounded first: 0.9996 with three digits is 1.00, and its exponent 0.
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])
    if exponent < -4 or abs(value) >= _HUGE:
        return _scientific(value, digits)
    return fixed(value, max(0, digits - 1 - exponent))


def _scientific(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


def general(value: float | None) -> str:
    """Four digits at most and no zeros at the end: `0.0524`, for a value that stands next to a bound."""
    if value is None or not math.isfinite(value):
        return fixed(value, 0)
    return f"{value:.4g}".replace("-", "−")


def decimals_for(half_width: float, digits: int = 2) -> int:
    """Decimals that show an uncertainty with two significant digits: a value needs no more than its interval."""
    if not math.isfinite(half_width) or half_width <= 0:
        return 4
    return min(8, max(0, digits - 1 - math.floor(math.log10(half_width))))


def span(low: float, high: float, decimals: int) -> str:
    """`0.8 to 3.4`."""
    return f"{fixed(low, decimals)} to {fixed(high, decimals)}"


def percent(share: float | None, decimals: int = 1) -> str:
    """0.893 -> `89.3 %`."""
    if share is None or math.isnan(share):
        return NOT_MEASURED
    return f"{fixed(100 * share, decimals)} %"


def size(count: int | None) -> str:
    """Bytes in decimal units with three digits: `1.90 MB`."""
    if count is None:
        return NOT_MEASURED
    value, step = float(count), 0
    while value >= 999.5 and step < len(_UNITS) - 1:
        value, step = value / 1000, step + 1
    return f"{fixed(value, 0) if step == 0 else significant(value)} {_UNITS[step]}"


def count(value: int | None) -> str:
    """`102,400`."""
    return NOT_MEASURED if value is None else f"{value:,}"


def seconds(value: float | None) -> str:
    """`0.42 s`, `12 s`, `3 min 20 s`."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    if value < 90:
        return f"{significant(value, 2)} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 90:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def plural(number: int, noun: str) -> str:
    """`1 task`, `6 tasks`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def listed(words: list[str], at_most: int = 12) -> str:
    """`a, b and c`; what is beyond at_most is counted."""
    if len(words) > at_most:
        return f"{', '.join(words[:at_most])} and {len(words) - at_most} more"
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""


def shortened(text: str, length: int) -> str:
    """At most so many printable characters, cut in the middle: both ends of a path or a name tell it apart."""
    text = printable(text)
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def printable(text: str) -> str:
    """The text on one line, with a sign in place of what can't be shown (and what XML doesn't allow)."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
