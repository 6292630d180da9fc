"""Rules by which `xblip augment` asks about numerals' captions: the LLM of this world answers questions but writes none.

They are made of the tables that the LLM learnt from, so that it knows every word of what is asked, and checks it.

    python -m xblip_numerals.rules --out rules.yaml
"""

import argparse
from pathlib import Path
from typing import Any

import yaml

from xblip.agreement import stands_in
from xblip_numerals.kinds import KINDS
from xblip_numerals.language import MODALITIES
from xblip_numerals.phrases import FORMS, VALUES

WITH_ARTICLE = {"sign", "robot"}
"""Values that are things: "is it a sign?" """


def make_rules() -> dict[str, dict[str, Any]]:
    """Returns a rule for each fact, as `xblip.rule_writer.Rule` has them."""
    rules = {}
    for fact, values in VALUES.items():
        rules[fact] = {
            "answers": list(values),
            "questions": [text for text in KINDS[fact].plain if not any(stands_in(value, text) for value in values)],
            "modalities": [known.noun for known in MODALITIES.values() if fact in known.clauses],
        }
        state, does = FORMS.get(fact, ("{}", "is {}"))[:2]
        check, contrast = ("check_number", "which_shows") if fact == "number" else ("check_attribute", "which_is")
        if not WITH_ARTICLE & set(values):
            said = {"v": state.format("{answer}"), "does": does.format("{answer}")}
            rules[fact]["checks"] = [text.format(**said) for text in KINDS[check].plain]
            rules[fact]["contrasts"] = [text.format(**said) for text in KINDS[contrast].plain]
    return rules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(yaml.safe_dump(make_rules(), sort_keys=False, width=120))


if __name__ == "__main__":
    main()
