"""The card of a pipeline that was given other parts after its training, so that it says nothing that no longer holds."""

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from diffusers_ext.atomic_files import atomic_write
from diffusers_ext.hub.cards import CARD_TEMPLATE
from diffusers_ext.hub.saved_folder import SavedFolder


_COMPONENTS = re.compile(r"^\| component \|.*\n(?:\|.*(?:\n|\Z))+", re.MULTILINE)
_RESULTS = re.compile(r"(?<=^## Results\n\n).*?(?=\n\n## Use\n)", re.MULTILINE | re.DOTALL)


def renew_card(folder: Path, results: str) -> Path | None:
    """Lists the parts that are now in `folder` in its card, and drops the figures, which were of the pipeline before.

    Args:
        results: What stands in the place of the figures, in Markdown.

    Returns: The path of the card; None if there is no card, or it is none of `write_card`.

    Raises:
        ValueError: if the folder holds no whole pipeline or model.
    """
    path = folder / "README.md"
    if not path.is_file():
        return None
    card = ModelCard.load(path)
    if not (_COMPONENTS.search(card.text) and _RESULTS.search(card.text)):
        return None
    text = _COMPONENTS.sub(lambda _: _table(folder), card.text, count=1)
    card.text = _RESULTS.sub(lambda _: results, text, count=1)
    card.data.eval_results = card.data.model_name = None  # the Hub's tables of the same figures
    with atomic_write(path) as partial:
        partial.write_text(str(card), encoding="utf-8")
    return path


def _table(folder: Path) -> str:
    """The table of components as the template of cards has it."""
    parts = SavedFolder.read(folder).components
    card = ModelCard.from_template(ModelCardData(), template_path=str(CARD_TEMPLATE), components=parts)
    return _COMPONENTS.search(card.text)[0]
