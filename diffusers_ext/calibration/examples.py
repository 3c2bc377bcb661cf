"""Real images of a data set with what each of them can be asked for by: a label or several, a text, a condition image."""

from dataclasses import dataclass, replace

from torch import Tensor

from diffusers_ext.evaluation.labelled_images import LabelledImages, drawn_in_turn, drawn_order
from diffusers_ext.evaluation.real_images import RealImages, is_test_split


@dataclass(frozen=True, eq=False)
class Examples:
    """Real images, each with what it can be asked for by.

    Attributes:
        images: With their labels.
        captions: Of the images; None without.
        conditions: Their condition images of a column, uint8; None without.
        sets: Which labels each has, bool, `(images, labels)`, where it can have several; None otherwise.
    """

    images: LabelledImages
    captions: tuple[str, ...] | None = None
    conditions: Tensor | None = None
    sets: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: Tensor) -> "Examples":
        """Those of these numbers."""
        captions = None if self.captions is None else tuple(self.captions[row] for row in rows.tolist())
        others = (None if each is None else each[rows] for each in (self.conditions, self.sets))
        return Examples(self.images.take(rows), captions, *others)

    def can_be_asked_as(self, others: "Examples") -> bool:
        """Whether these images too have all that others can be asked for by."""
        pairs = ((getattr(each, name) for each in (self, others)) for name in ("captions", "conditions", "sets"))
        return len(self) > 0 and all(mine is not None or theirs is None for mine, theirs in pairs)

    def with_labels(self) -> "Examples":
        """Those that have a label, where they can have several."""
        return self if self.sets is None else self.take(self.sets.any(1).nonzero().flatten())

    def at_most(self, number: int, seed: int) -> "Examples":
        """So many of them that the seed draws, or all of them in that order."""
        return self.take(drawn_order(len(self), seed)[:number])

    def draw(self, number: int, seed: int) -> "Examples":
        """So many of them: each once in an order that the seed draws, then again in this order."""
        return self.take(drawn_in_turn(len(self), number, seed))


@dataclass(frozen=True, eq=False)
class Parts:
    """Examples to learn from, to choose by, and others to report by; none of them of a test split.

    Attributes:
        train: What the network was trained on.
        source: Where those to choose and to report by are from, in words.
        held_out: Whether the network was not trained on those to choose by.
    """

    train: Examples
    choose: Examples
    report: Examples
    source: str
    held_out: bool

    def with_labels(self) -> "Parts":
        """Without images of no label, where they can have several."""
        each = {name: getattr(self, name).with_labels() for name in ("train", "choose", "report")}
        return replace(self, **each)

    @classmethod
    def of(cls, real: RealImages, held_out_name: str | None, seed: int) -> "Parts":
        """A split that is no test split and the training images; without one, two halves of the training images.

        Args:
            held_out_name: The split that the held-out images are of, or None.
        """
        texts = [None if each is None else each.texts for each in (real.train_captions, real.held_out_captions)]
        train = Examples(real.train, texts[0], real.train_conditions, real.train_sets)
        if real.held_out is not None and not is_test_split(held_out_name):
            held_out = Examples(real.held_out, texts[1], real.held_out_conditions, real.held_out_sets)
            if held_out.can_be_asked_as(train):
                source = f"the split {held_out_name}, and reported by the training images"
                return cls(train, held_out, train, source, True)
        if len(train) < 2:
            return cls(train, train, train, "the training images", False)
        order = drawn_order(len(train), seed)
        halves = [train.take(rows) for rows in (order[: len(order) // 2], order[len(order) // 2 :])]
        return cls(train, *halves, "one half of the training images, and reported by the other", False)
