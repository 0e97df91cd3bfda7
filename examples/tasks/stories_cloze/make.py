"""Makes stories_cloze.jsonl from the bundled evaluation text: which of four sentences comes next in a story?

The three wrong ones stand at the same place in other stories. Run it from the repository's root:
python examples/tasks/stories_cloze/make.py
"""

import json
import random
import re
from pathlib import Path

HERE = Path(__file__).parent
TEXT = HERE.parents[1] / "stories_evaluation.txt"
COUNT, CHOICES, PLACE = 100, 4, 4


def sentences(story: str) -> list[str]:
    """The sentences of a story, each with its full stop."""
    return re.findall(r"\S[^.!?]*[.!?]+\"?", " ".join(story.split()))


def main() -> None:
    """Writes the examples, the same ones every time."""
    draw = random.Random(0)
    stories = [found for story in TEXT.read_text("utf-8").split("\n\n") if len(found := sentences(story)) > PLACE]
    with (HERE / "stories_cloze.jsonl").open("w", encoding="utf-8") as file:
        for number, story in enumerate(stories[:COUNT]):
            others = draw.sample([other for other in stories if other is not story], CHOICES - 1)
            choices = [other[PLACE] for other in others]
            label = draw.randrange(CHOICES)
            choices.insert(label, story[PLACE])
            example = {"id": number, "story": " ".join(story[:PLACE]), "choices": choices, "label": label}
            file.write(json.dumps(example, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
