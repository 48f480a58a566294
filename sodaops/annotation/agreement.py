"""How far annotators agree; pure functions of their labels."""

from collections import Counter
from collections.abc import Sequence

Pair = tuple[str, str]


def raw_agreement(pairs: Sequence[Pair]) -> float | None:
    """The share of items to which two annotators gave the same label.

    Args:
        pairs: for each item that both labelled, the label of the one and of the other.

    Returns:
        A fraction in [0, 1]; None without items.

    >>> raw_agreement([("good", "good"), ("good", "bad"), ("bad", "bad"), ("bad", "bad")])
    0.75
    """
    return sum(one == other for one, other in pairs) / len(pairs) if pairs else None


def cohen_kappa(pairs: Sequence[Pair]) -> float | None:
    """Agreement of two annotators beyond what chance would bring (Cohen 1960).

    kappa = (p_o - p_e) / (1 - p_e), where p_o is the raw agreement and p_e = sum over labels of the product of the shares
    in which the two gave that label. (J. Cohen, A coefficient of agreement for nominal scales, Educational and
    Psychological Measurement 20, 1960, 37 to 46.)

    Args:
        pairs: for each item that both labelled, the label of the one and of the other.

    Returns:
        At most 1; 0 is what chance brings, less is worse than chance. None without items, and where both gave one and
        the same label to all: chance then explains everything, and kappa is not defined.

    The example of 50 items, of which 20 are yes to both, 15 no to both, 5 yes and no, 10 no and yes: p_o = 0.7, p_e = 0.5.

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
    ours, theirs = Counter(one for one, _ in pairs), Counter(other for _, other in pairs)
    by_chance = sum(count * theirs[label] for label, count in ours.items())  # n * n * p_e, a whole number
    if by_chance == n * n:
        return None
    alike = sum(one == other for one, other in pairs)
    return (n * alike - by_chance) / (n * n - by_chance)


def majority(labels: Sequence[str]) -> str | None:
    """The label that was given most often; None on a tie, and without labels.

    >>> majority(["good", "bad", "good"])
    'good'
    >>> majority(["good", "bad"]) is None
    True
    """
    first, *rest = Counter(labels).most_common(2) or [(None, 0)]
    return None if rest and rest[0][1] == first[1] else first[0]
