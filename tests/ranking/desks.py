"""Drafts, desks and requests for the tests of ranking."""

import json

from chatyuan.ranking.items import read_items
from chatyuan.text.files import Skipped


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def drafts(folder, count=6, answers=3):
    """A file of `count` prompts with as many answers each, of sources m0, m1, ..."""
    rows = [
        {"prompt": f"问题{i}？",
         "answers": [{"text": f"回答{i}-{k}", "source": f"m{k}"} for k in range(answers)]}
        for i in range(count)
    ]  # fmt: skip
    return write_rows(folder / "drafts.jsonl", rows)


def items_of(folder, **sizes):
    return read_items([str(drafts(folder, **sizes))], 9, 0, Skipped())[0]


def ranked(desk, annotator, item, best_first, **more):
    """Saves an item with its answers (indices of the item's) in this order, lists being ties."""
    tiers = [tier if isinstance(tier, list) else [tier] for tier in best_first]
    rank = {index: place for place, tier in enumerate(tiers, 1) for index in tier}
    order = item.shown(desk.seed, annotator)
    return desk.save({"annotator": annotator, "item": item.key, "seconds": 1.0,
                      "ranks": [rank[index] for index in order], **more})  # fmt: skip
