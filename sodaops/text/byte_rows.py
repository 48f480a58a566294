"""The bytes of many texts in a row, and changes to all of them at once."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SPACE = ord(" ")
_REFERENCES = {b"&amp;": "&", b"&lt;": "<", b"&gt;": ">", b"&quot;": '"', b"&#39;": "'"}
Ranges = tuple[np.ndarray, np.ndarray]  # starts and ends, int64 [n], in order, disjoint, each within a text


def flat(texts: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of an array of texts, not copied.

    Args:
        texts: string [n], without nulls.

    Returns:
        offsets, int32 [n + 1]: text i is ``data[offsets[i]:offsets[i + 1]]``; and data, uint8, UTF-8.
    """
    if len(texts) == 0:
        return np.zeros(1, np.int32), np.zeros(0, np.uint8)
    _, offsets, data = texts.buffers()
    used = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    return used, np.frombuffer(data, np.uint8) if data is not None and data.size else np.zeros(0, np.uint8)


def _is_alnum(data: np.ndarray) -> np.ndarray:
    """Letters and digits of ASCII: a subtraction wraps round, so each range is one comparison."""
    return ((data | 0x20) - np.uint8(ord("a")) < 26) | (data - np.uint8(ord("0")) < 10)


class ByteRows:
    """Texts that are changed together, by what their ASCII says; the array that they come from stays as it is.

    Args:
        texts: string [n], without nulls.
    """

    def __init__(self, texts: pa.StringArray) -> None:
        offsets, data = flat(texts)
        self.data = data[offsets[0] : offsets[-1]].copy()  # uint8
        self.offsets = offsets - offsets[0]  # int32 [n + 1]
        self._gone = np.zeros(len(self.data), bool)  # bytes to leave out; until then they stand between what stays

    def array(self) -> pa.StringArray:
        """The texts as they are now, without a space at the end."""
        places = np.flatnonzero(self._gone)
        kept = np.compress(~self._gone, self.data) if len(places) else self.data
        offsets = self.offsets - np.searchsorted(places, self.offsets).astype(np.int32)
        texts = pa.Array.from_buffers(pa.string(), len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(kept)])
        return pc.ascii_rtrim(texts, " ")

    def with_control(self) -> np.ndarray:
        """Which texts hold control characters, line ends and tabs among them: bool [n]."""
        return self._marked(np.flatnonzero((self.data < SPACE) | (self.data == 127)))

    def resolve_references(self) -> np.ndarray:
        """Puts characters in the place of common references, as ``&amp;``; tells which texts may hold others: bool [n]."""
        places = np.flatnonzero(self.data == ord("&"))
        if not len(places):
            return self._marked(places)
        others = np.ones(len(places), bool)
        for name, character in _REFERENCES.items():
            hit = self._reads(places, name, exactly=True)  # &Lt; is another character
            self.data[places[hit]] = ord(character)
            others &= ~hit
            for i in range(1, len(name)):
                self._gone[places[hit] + i] = True
        follows = self.data[np.minimum(places + 1, len(self.data) - 1)]
        return self._marked(places[others & (_is_alnum(follows) | (follows == ord("#")))])

    def collapse_spaces(self) -> None:
        """Leaves one space of each run, and none before a text."""
        space = self.data == SPACE
        self._gone[1:] |= space[1:] & space[:-1]
        first = self.offsets[:-1][np.diff(self.offsets) > 0]
        self._gone[first] |= space[first]

    def links(self) -> Ranges:
        """What begins with http://, https:// or www., case ignored, up to a space."""
        colons = np.flatnonzero(self.data == ord(":"))
        dots = np.flatnonzero(self.data == ord("."))
        dots = dots[self.data[dots - 1] | 0x20 == ord("w")]
        starts, afters = [], []
        for word, places in ((b"http://", colons - 4), (b"https://", colons - 5), (b"www.", dots - 3)):
            found = places[self._reads(places, word)]
            starts.append(found)
            afters.append(found + len(word))
        start, after = np.concatenate(starts), np.concatenate(afters)
        if not len(start):
            return start, start
        end = self._next(self.data == SPACE, after)
        start, end = start[end > after], end[end > after]  # at least a character follows
        end, first = np.unique(end[(order := np.argsort(start))], return_index=True)  # of those up to the same space
        return start[order][first], end

    def tags(self, marks: bytes) -> Ranges:
        """Handles (``@``, which follows no letter, digit or _) and hashtags (``#``), to the end of the word."""
        found = np.zeros(len(self.data), bool)
        for mark in marks:
            found |= self.data == mark
        places = np.flatnonzero(found & ~self._gone)
        if not len(places):
            return places, places
        word = _is_alnum(self.data) | (self.data == ord("_"))
        begins = (places == self.offsets[self._texts(places)]) | ~word[places - 1]
        places = places[begins | (self.data[places] == ord("#"))]
        ends = self._next(~word, places + 1)
        return places[ends > places + 1], ends[ends > places + 1]

    def blank(self, ranges: Ranges) -> None:
        """Spaces in place of ranges."""
        if len(ranges[0]):
            np.copyto(self.data, SPACE, where=self._within(ranges))

    def put(self, word: bytes, ranges: Ranges) -> np.ndarray:
        """A word in place of each range; tells in which texts a range was too short, and stays: bool [n]."""
        starts, ends = ranges
        if not len(starts):
            return self._marked(starts)
        fits = ends - starts >= len(word)
        unchanged = self._marked(starts[~fits])
        starts, ends = starts[fits], ends[fits]
        for i, byte in enumerate(word):
            self.data[starts + i] = byte
        self._gone |= self._within((starts + len(word), ends))
        return unchanged

    def _texts(self, places: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.offsets, places, side="right") - 1

    def _marked(self, places: np.ndarray) -> np.ndarray:
        marked = np.zeros(len(self.offsets) - 1, bool)
        marked[self._texts(places)] = True
        return marked

    def _reads(self, places: np.ndarray, word: bytes, exactly: bool = False) -> np.ndarray:
        """Where a word in lower case stands whole in a text, case ignored unless asked exactly: bool [places]."""
        inside = (places >= 0) & (places + len(word) <= len(self.data))
        for i, byte in enumerate(word):
            at = np.flatnonzero(inside)
            found = self.data[places[at] + i]
            inside[at] = (found == byte) | ((found == ord(chr(byte).upper())) & (not exactly))
        at = np.flatnonzero(inside)
        inside[at] = self._texts(places[at]) == self._texts(places[at] + len(word) - 1)
        return inside

    def _next(self, stops: np.ndarray, places: np.ndarray) -> np.ndarray:
        """The first stop at or after each place, or the end of its text (that of the byte before it)."""
        found = np.append(np.flatnonzero(stops), len(stops))
        ends = self.offsets[self._texts(places - 1) + 1]
        return np.minimum(found[np.searchsorted(found, places)], ends)

    def _within(self, ranges: Ranges) -> np.ndarray:
        """Which bytes lie in ranges: bool [bytes]."""
        steps = np.zeros(len(self.data) + 1, np.int8)
        steps[ranges[0]] += 1
        steps[ranges[1]] -= 1
        return np.cumsum(steps[:-1], dtype=np.int8).view(bool)
