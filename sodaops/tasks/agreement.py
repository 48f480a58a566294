"""Measures of the agreement between annotators."""

import operator
from collections import Counter
from collections.abc import Callable, Sequence

Pair = tuple[str, str]


def raw_agreement(pairs: Sequence[Pair], agree: Callable[[str, str], bool] = operator.eq) -> float | None:
    """The share of items to which two annotators gave the same label.

    Args:
        pairs: for each item that both labelled, their two labels.
        agree: whether two labels count as the same.

    Returns:
        A fraction in [0, 1]; None without items.

    >>> raw_agreement([("good", "good"), ("good", "bad"), ("bad", "bad"), ("bad", "bad")])
    0.75
    """
    return sum(agree(one, other) for one, other in pairs) / len(pairs) if pairs else None


def cohen_kappa(pairs: Sequence[Pair]) -> float | None:
    """Cohen's kappa, the agreement of two annotators beyond chance.

    kappa = (p_o - p_e) / (1 - p_e), where p_o is the raw agreement and p_e = sum over labels of the product of the shares
    in which the two gave that label. (J. Cohen, A coefficient of agreement for nominal scales, Educational and
    Psychological Measurement 20, 1960, 37 to 46.)

    Args:
        pairs: for each item that both labelled, their two labels.

    Returns:
        At most 1; 0 is agreement by chance. None without items, and where p_e is 1: both gave one and
        the same label to all items.

    Example: of 50 items, both say yes to 20 and no to 15, and they differ on 5 and 10: p_o = 0.7, p_e = 0.5.

    >>> yes, no = "yes", "no"
    >>> round(cohen_kappa(20 * [(yes, yes)] + 15 * [(no, no)] + 5 * [(yes, no)] + 10 * [(no, yes)]), 6)
    0.4
    >>> cohen_kappa([(yes, no), (no, yes)])
    -1.0
    >>> cohen_kappa([(yes, yes), (yes, yes)]) is None
    True
    """
    if not pairs:
        return None
    n = len(pairs)
    counts_one, counts_other = Counter(one for one, _ in pairs), Counter(other for _, other in pairs)
    # p_o and p_e times n * n: whole numbers, so that p_e == 1 is recognised exactly
    observed = n * sum(one == other for one, other in pairs)
    expected = sum(count * counts_other[label] for label, count in counts_one.items())
    return None if expected == n * n else (observed - expected) / (n * n - expected)


def majority_label(labels: Sequence[str]) -> str | None:
    """The label that was given most often; None on a tie, and without labels.

    >>> majority_label(["good", "bad", "good"])
    'good'
    >>> majority_label(["good", "bad"]) is None
    True
    """
    first, *rest = Counter(labels).most_common(2) or [("", 0)]
    return None if not labels or (rest and rest[0][1] == first[1]) else first[0]
