"""How reports write numbers, and text that came from somebody's data set."""

from __future__ import annotations

import math
import re
from typing import TypeGuard

# Control characters, line separators, bidi marks and overrides, soft hyphens, zero-width and tag characters, lone
# surrogates. The zero-width joiners U+200C and U+200D stay: Persian, Indic scripts and emoji need them.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_LINE_SPACE = re.compile(r"[\t\r\n]+")


def visible(text: str) -> str:
    r"""Return `text` on one line, its unseen characters written as Python escapes.

    Line breaks and tabs become one space. What is left can be printed anywhere: it holds no escape sequence, turns no
    reading direction and can be encoded as UTF-8.

    >>> visible("red\ncar \x1b[2J")
    'red car \\x1b[2J'
    """
    return _HIDDEN.sub(_escape, _LINE_SPACE.sub(" ", text))


def _escape(hidden: re.Match[str]) -> str:
    return hidden.group().encode("unicode_escape").decode("ascii")


def format_number(value: float, digits: int = 3) -> str:
    """Return `value` to `digits` significant digits, trailing zeros kept.

    >>> format_number(0.5), format_number(-1234.5), format_number(1.2e-7)
    ('0.500', '-1230', '1.20e-07')
    """
    rounded = float(f"{value:.{digits}g}")
    if 10**digits <= abs(rounded) < 1e6:
        return f"{rounded:.0f}"
    return f"{rounded:#.{digits}g}".removesuffix(".")


def format_error(standard_error: float | None) -> str:
    """Return a standard error to two significant digits, or `n/a` where there is none.

    >>> format_error(0.0512), format_error(None)
    ('± 0.051', '± n/a')
    """
    return f"± {format_number(standard_error, 2)}" if is_known(standard_error) else "± n/a"


def format_share(share: float | None, standard_error: float | None) -> str:
    """Return a share with its standard error, in percent, or `n/a` where there is none.

    >>> format_share(0.123, 0.0245), format_share(1.0, None), format_share(None, None)
    ('12.3 % ± 2.5 %', '100.0 % ± n/a', 'n/a')
    """
    if not is_known(share):
        return "n/a"
    error = f"{standard_error:.1%}".replace("%", " %") if is_known(standard_error) else "n/a"
    return f"{share:.1%} ± {error}".replace("% ±", " % ±")


def format_value(value: str | int | float) -> str:
    """Return a setting or a cost as a person would write it; floats to six significant digits.

    >>> format_value(51200), format_value(0.1 + 0.2)
    ('51200', '0.3')
    """
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def is_known(value: float | None) -> TypeGuard[float]:
    """Return whether `value` is there and finite."""
    return value is not None and math.isfinite(value)
