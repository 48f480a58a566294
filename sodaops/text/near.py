"""Near duplicates: texts with the same words and small changes."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

_GRAM = 5
_MAX_COMPARED = 100
_NOT_WORD = re.compile(r"[\W_]+")


class NearTexts:
    """Finds near duplicates of texts.

    Args:
        texts: where to look.
        near: the least Jaccard similarity of the sets of character 5-grams, in lower case and without punctuation.
    """

    def __init__(self, texts: Sequence[str], near: float) -> None:
        self._texts, self._near = texts, near
        self._sizes: list[int] = []  # 5-grams of each text
        self._index: dict[str, list[int]] = defaultdict(list)  # 5-gram -> indices of the texts that have it
        for number, text in enumerate(texts):
            grams = _char_grams(text)
            self._sizes.append(len(grams))
            for gram in grams:
                self._index[gram].append(number)

    def find(self, text: str) -> str | None:
        """The most similar text, or None if none is similar enough.

        >>> NearTexts(["the train is late again", "I love this"], 0.7).find("The train is late again!!")
        'the train is late again'
        >>> NearTexts(["the train is late again"], 0.7).find("the plane is late again") is None
        True
        """
        grams = _char_grams(text)
        shared = Counter(number for gram in grams for number in self._index.get(gram, ()))
        # Jaccard similarity: shared 5-grams / (all 5-grams of both)
        similarities = [(n / (len(grams) + self._sizes[number] - n), number) for number, n in shared.items()]
        similarity, number = max(similarities, default=(0.0, -1))
        return self._texts[number] if number >= 0 and similarity >= self._near else None


def near_pairs(texts: Sequence[str], near: float) -> Iterator[tuple[int, int]]:
    """The pairs of texts with at least this similarity, as :class:`NearTexts` measures it; the later index first.

    Two sets of similarity ``near`` share one of the rarest ``n - ceil(near * n) + 1`` of their n elements, so only those are
    indexed (R. Bayardo, Y. Ma and R. Srikant, "Scaling Up All Pairs Similarity Search", WWW 2007). Of more than 100 texts that
    share one, as those made from a template do, a text is compared with the last 100.

    >>> list(near_pairs(["the train is late again", "I love this", "The train is late again!!"], 0.7))
    [(2, 0)]
    """
    counts = Counter(gram for text in texts for gram in _char_grams(text))
    index: dict[str, list[int]] = defaultdict(list)
    for number, own in enumerate(map(_char_grams, texts)):
        rarest = sorted(own, key=lambda gram: (counts[gram], gram))[: len(own) - max(1, math.ceil(near * len(own) - 1e-9)) + 1]
        for other in sorted({other for gram in rarest for other in index[gram][-_MAX_COMPARED:]}):
            theirs = _char_grams(texts[other])
            if len(own & theirs) >= near * len(own | theirs):
                yield number, other
        for gram in rarest:
            index[gram].append(number)


def _char_grams(text: str) -> set[str]:
    padded = f" {_NOT_WORD.sub(' ', text.lower()).strip() or text} "
    return {padded[i : i + _GRAM] for i in range(max(1, len(padded) - _GRAM + 1))}
