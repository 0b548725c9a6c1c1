"""Write bench/results/experiments.md and its plots from the JSON files of the experiments.

    python page.py

Every figure on the page comes from a file in bench/results/experiments; nothing is typed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from common import RESULTS, load_results
from sections.expectations import expectations
from sections.features import features
from sections.lissa import lissa
from sections.preconditioner import preconditioner
from sections.removal import large_steps, removal_set
from sections.runs import Results
from sections.samplers import samplers
from sections.text import text_model, tokens
from sections.variants import variants

PAGE = RESULTS.parent / "experiments.md"

HEAD = """# Experiments

What holds of "Faithful and Fast Influence Function via Advanced Sampling" (arXiv 2510.26776), and
what does not: class removal in four settings, all samplers side by side. Every table is made by
`bench/experiments/page.py` from the JSON files in `experiments/`; each names the command that made
them, and may be run again: a run that is stopped goes on where it was. Intervals are 95 % bootstrap
intervals over seeds, p values are Wilcoxon's signed-rank test over seeds.

"""

SECTIONS: Iterable[tuple[str, Callable[[list[Results]], str]]] = (
    ("samplers", samplers),
    ("features", features),
    ("variants", variants),
    ("lissa", lissa),
    ("removal_set", removal_set),
    ("large_steps", large_steps),
    ("text_model", text_model),
    ("tokens", tokens),
    ("preconditioner", preconditioner),
)


def main() -> None:
    made = []
    if (RESULTS / "samplers-fashion-mnist.json").is_file():
        made.append(expectations(RESULTS))
    for prefix, section in SECTIONS:
        found = [load_results(p) | {"path": p} for p in sorted(RESULTS.glob(f"{prefix}-*.json"))]
        if found:
            made.append(section(found))
    PAGE.write_text(HEAD + "\n\n".join(made) + "\n")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
