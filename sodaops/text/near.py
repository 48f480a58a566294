"""Near duplicates: texts with the same words and small changes."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

_GRAM = 5
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


def _char_grams(text: str) -> set[str]:
    padded = f" {_NOT_WORD.sub(' ', text.lower()).strip() or text} "
    return {padded[i : i + _GRAM] for i in range(max(1, len(padded) - _GRAM + 1))}
