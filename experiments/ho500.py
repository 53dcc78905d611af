"""HO500: 500 held-out concepts for training on Concept500 or Concept16k of Gemma-2-2B, layer 20.

    python experiments/ho500.py --list FILE --exclude FILE... --out ho500.jsonl

Files of AxBench: --list is `demo/gemma-2-2b_20-gemmascope-res-16k.json` (commit 19004a6), --exclude are the
`metadata.jsonl` of the four Concept500 and the two ConceptFD sets (commit e9b8cd4), in any order. Expected:
`hypersteer_jax/data/axbench/ho500.jsonl`, byte for byte.

The paper (arXiv 2506.03292, section 4) scores 500 held-out concepts and never said which. These are drawn from the
SAE's 16,383 described features, less those

- of Concept500 or ConceptFD, and those of the same name as one of their concepts, letter case, punctuation and spacing
  not counted, so that runs trained on these sets can be scored on them;
- of the ten held-out features of the ablations, so that both lists can be held out together;
- whose name another feature has as well, so that holding a feature out holds its name out.

Drawn by SHA-256 of seed and feature, which no version of Python or numpy changes.
"""

import argparse
import hashlib
import json
from collections import Counter
from pathlib import Path

from hypersteer_jax.data.concepts import Concept, load_list, normalised, read_concepts

SEED, COUNT = 0, 500


def draw(described: list[Concept], excluded: list[Concept], seed: int, count: int) -> list[Concept]:
    """`count` of the described concepts, in the order of their features' numbers."""
    names = Counter(normalised(concept.text) for concept in described)
    names.update(normalised(concept.text) for concept in excluded)
    features = {concept.feature for concept in excluded}
    left = [c for c in described if c.feature not in features and names[normalised(c.text)] == 1]
    chosen = sorted(left, key=lambda c: hashlib.sha256(f"{seed} {c.feature}".encode()).digest())[:count]
    return sorted(chosen, key=lambda c: int(c.feature.rsplit("/", 1)[1]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", type=Path, required=True)
    parser.add_argument("--exclude", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    excluded = load_list("ablations10")
    for path in args.exclude:
        excluded += read_concepts(path)
    chosen = draw(read_concepts(args.list), excluded, SEED, COUNT)
    lines = [json.dumps({"feature": c.feature, "concept": c.text}, ensure_ascii=False) for c in chosen]
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
