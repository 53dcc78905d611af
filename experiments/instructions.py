"""The instructions that runs are evaluated on by default, put together from two freely licensed sets.

    python experiments/instructions.py --self-instruct user_oriented_instructions.jsonl --vicuna question.jsonl

AlpacaEval's 805 instructions, which AxBench draws from, may not be used commercially; these are two of the sets that
it was made of. --self-instruct is `human_eval/user_oriented_instructions.jsonl` of yizhongw/self-instruct at 0b26cca,
--vicuna `fastchat/llm_judge/data/vicuna_bench/question.jsonl` of lm-sys/FastChat at 0e6d3e4 (Apache-2.0 both).
Expected: `hypersteer_jax/evaluation/instructions.jsonl`, byte for byte: 332 instructions, inputs behind them as in
AlpacaEval, which has all of them.
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--self-instruct", type=Path, required=True)
    parser.add_argument("--vicuna", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("hypersteer_jax/evaluation/instructions.jsonl"))
    args = parser.parse_args()
    found = []
    for row in map(json.loads, args.self_instruct.read_text(encoding="utf-8").splitlines()):
        parts = (row["instruction"], row["instances"][0]["input"])
        found.append({"instruction": "\n\n".join(filter(None, map(str.strip, parts))), "source": "self-instruct"})
    for row in map(json.loads, args.vicuna.read_text(encoding="utf-8").splitlines()):
        found.append({"instruction": row["turns"][0].strip(), "source": "vicuna_bench"})
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
    args.out.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
