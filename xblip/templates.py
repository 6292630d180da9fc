"""Templates: the words in which a modality's captions, questions and labels are asked for when rows do not say.

They are data: a YAML for each modality, as those in `configs/templates`, read by the modality's own words ("the sound",
"the object"), since the core knows none.
"""

import string
from dataclasses import dataclass, field
from pathlib import Path

from xblip import config as configs
from xblip.errors import ConfigError


@dataclass
class Templates:
    """Instructions for rows that have none, by the task of a row.

    Attributes:
      caption: asks for a description.
      question: holds `{question}`, the row's own.
      classification: asks what it is.
    """

    caption: list[str] = field(default_factory=list)
    question: list[str] = field(default_factory=list)
    classification: list[str] = field(default_factory=list)

    def of(self, task: str) -> list[str]:
        """Returns the templates of a row's task; none if there are none."""
        return getattr(self, task) if task else []


def load_templates(path: str | Path) -> Templates:
    """Reads a YAML of templates.

    Raises:
      ConfigError: no such file, an unknown task, or a template that lacks `{question}`, holds other braces or is empty.
    """
    templates = configs.build(Templates, configs.load_yaml(path), where="templates")
    for task in ("caption", "question", "classification"):
        wanted = ["question"] if task == "question" else []
        for text in templates.of(task):
            try:
                holes = [name for _, name, *_ in string.Formatter().parse(text) if name is not None]
            except ValueError:
                holes = None
            if holes != wanted or not text.strip():
                expected = "{question} once, and no other braces" if wanted else "words without braces"
                raise ConfigError(f'{path}: the {task} template "{text}" must hold {expected}.')
    return templates
