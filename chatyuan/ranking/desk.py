"""Who gets which item, and what comes of what they say. Thread safe; knows nothing of HTTP."""

import dataclasses
import datetime
import threading
import time
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from chatyuan.ranking.agreement import agreement
from chatyuan.ranking.items import LETTERS, Item
from chatyuan.ranking.store import Annotation, AnnotationLog

# Reasons to skip -> whether they settle the item; otherwise another annotator is asked.
SKIP_REASONS = {"all_bad": True, "unclear_prompt": True, "cannot_judge": False}
NAME_LENGTH = 64
_LEASE = 1800.0  # seconds that an item on somebody's screen is not given to others


class Refused(Exception):
    """A request that makes no sense; its text is one word for the page."""


class Desk:
    """Gives items out and takes annotations in.

    Every `overlap_period`-th item is given to two annotators, the others to one.
    """

    def __init__(
        self,
        items: Sequence[Item],
        log: AnnotationLog,
        *,
        seed: int,
        overlap_period: int,
        taxonomy: Sequence[str] = (),
    ) -> None:
        """Starts where the log ends.

        Args:
            items: in the order in which they are given out.
            log: open.
            seed: of the order of answers.
            overlap_period: 0 = no item is given to two.
            taxonomy: categories; with any, a ranking needs one.
        """
        self.items = list(items)
        self.log, self.seed, self.taxonomy = log, seed, list(taxonomy)
        self.overlap_period = overlap_period
        self._by_key = {item.key: item for item in items}
        self._needed = {
            item.key: 1 + bool(overlap_period and place % overlap_period == 0)
            for place, item in enumerate(items, 1)
        }
        self._leases: dict[str, tuple[str, float]] = {}
        self._agreement: dict[str, Any] | None = None
        self.saved = 0  # annotations since the start
        self._mutex = threading.Lock()
        self._closed = False

    # -- what the page asks for

    def start(self) -> dict[str, Any]:
        """What the page needs before it knows who is there."""
        return {"taxonomy": self.taxonomy, "reasons": list(SKIP_REASONS), "letters": LETTERS}

    def next(self, annotator: Any, leaving: Any = None) -> dict[str, Any]:
        """{"item": the next of this annotator or None, "progress"}. Raises Refused.

        `leaving`, another annotator who had this page, gives back what is on the screen.
        """
        name = _name(annotator)
        with self._mutex:
            self._leases.pop(str(leaving), None)
            return self._state(name, self._next(name))

    def previous(self, annotator: Any, key: Any) -> dict[str, Any]:
        """The item that this annotator saved before `key`, as it was saved; else that of `key`."""
        name = _name(annotator)
        with self._mutex:
            own = [k for k in self.log.by_annotator.get(name, {}) if k in self._by_key]
            before = own[: own.index(key)] if key in own else own
            item = self._by_key[before[-1]] if before else self._by_key.get(str(key))
            return self._state(name, item)

    def save(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Saves {"annotator", "item", "ranks" or "skipped", "category", "seconds"}.

        `ranks`: of the answers in the order shown, 1..K, smaller is better, equal is a tie.

        Returns:
            What `next` returns.

        Raises:
            Refused: nothing was saved, as the request makes no sense.
            OSError: nothing was saved, as the disk did not take it.
        """
        name = _name(request.get("annotator"))
        with self._mutex:
            if self._closed:
                raise Refused("closed")
            item = self._by_key.get(str(request.get("item")))
            if item is None:
                raise Refused("unknown_item")
            annotation = self._annotation(item, name, request)
            self.log.append(annotation)
            self.saved += 1
            if len(self.log.by_item[item.key]) > 1:
                self._agreement = None
            return self._state(name, self._next(name))

    def progress(self, annotator: str = "") -> dict[str, Any]:
        """Counts of all and of one annotator, and the agreement."""
        with self._mutex:
            return self._progress(annotator)

    def snapshot(self) -> dict[str, dict[str, Annotation]]:
        """The annotations of every item so far."""
        with self._mutex:
            return {key: dict(by_annotator) for key, by_annotator in self.log.by_item.items()}

    def close(self) -> None:
        """Waits for a save that is under way; later ones are refused."""
        with self._mutex:
            self._closed = True

    # -- how

    def _next(self, name: str) -> Item | None:
        """The first item that lacks an annotator, is on no other's screen and is new to this one.

        Second annotators come first: an item that waits for one is an agreement not yet known.
        """
        now = time.monotonic()
        elsewhere = [key for other, (key, since) in self._leases.items()
                     if other != name and now - since < _LEASE]  # fmt: skip
        own = self.log.by_annotator.get(name, {})
        fresh = None
        for item in self.items:
            settled = self._settled(item.key)
            if item.key in own or settled + elsewhere.count(item.key) >= self._needed[item.key]:
                continue
            if settled:
                fresh = item
                break
            fresh = fresh or item
        if fresh is None:
            self._leases.pop(name, None)
        else:
            self._leases[name] = (fresh.key, now)
        return fresh

    def _settled(self, key: str) -> int:
        """How many annotators have ranked an item, or skipped it for good."""
        found = self.log.by_item.get(key, {}).values()
        return sum(a.skipped is None or SKIP_REASONS.get(a.skipped, True) for a in found)

    def _state(self, name: str, item: Item | None) -> dict[str, Any]:
        shown = None
        if item is not None:
            order = item.shown(self.seed, name)
            answers = [item.answers[i] for i in order]
            shown = {"key": item.key, "prompt": item.prompt, "answers": answers, "ranks": None,
                     "category": None, "skipped": None}  # fmt: skip
            saved = self.log.by_item.get(item.key, {}).get(name)
            if saved is not None:
                shown |= {"category": saved.category, "skipped": saved.skipped}
                if saved.ranks is not None:
                    of_text = dict(zip(saved.answers, saved.ranks, strict=True))
                    shown["ranks"] = [of_text[text] + 1 for text in answers]
        return {"item": shown, "progress": self._progress(name)}

    def _annotation(self, item: Item, name: str, request: Mapping[str, Any]) -> Annotation:
        order = item.shown(self.seed, name)
        reason, category = request.get("skipped"), request.get("category")
        ranks = None
        if reason is None:
            ranks = _dense(request.get("ranks"), len(order))
            if bool(self.taxonomy) != (category is not None):
                raise Refused("no_category" if self.taxonomy else "unknown_category")
        elif not isinstance(reason, str) or reason not in SKIP_REASONS:
            raise Refused("unknown_reason")
        if category is not None and category not in self.taxonomy:
            raise Refused("unknown_category")
        seconds = request.get("seconds", 0.0)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
            raise Refused("bad_seconds")
        now = datetime.datetime.now(datetime.UTC)
        return Annotation(
            item=item.key,
            annotator=name,
            prompt=item.prompt,
            answers=tuple(item.answers[i] for i in order),
            sources=tuple(item.sources[i] for i in order),
            ranks=ranks,
            skipped=reason,
            category=category,
            seconds=round(float(min(seconds, 86400)), 1),
            time=now.isoformat(timespec="seconds"),
        )

    def _progress(self, name: str) -> dict[str, Any]:
        if self._agreement is None:
            groups = [list(by.values()) for by in self.log.by_item.values() if len(by) > 1]
            self._agreement = dataclasses.asdict(agreement(groups))
        counts = {key: self._settled(key) for key in self._by_key}
        own = [a for key, a in self.log.by_annotator.get(name, {}).items() if key in self._by_key]
        return {
            "items": len(self.items),
            "finished": sum(counts[key] >= self._needed[key] for key in counts),
            "waiting": sum(0 < counts[key] < self._needed[key] for key in counts),
            "annotators": len(self.log.by_annotator),
            "mine": len(own),
            "mine_skipped": sum(a.skipped is not None for a in own),
            "agreement": self._agreement,
        }


def _name(value: Any) -> str:
    """The name of an annotator as it is stored. Raises Refused."""
    name = unicodedata.normalize("NFC", value).strip() if isinstance(value, str) else ""
    # Categories C*: control and format characters, surrogates, unassigned.
    if not 0 < len(name) <= NAME_LENGTH or any(unicodedata.category(c)[0] == "C" for c in name):
        raise Refused("bad_name")
    return name


def _dense(ranks: Any, count: int) -> tuple[int, ...]:
    """1..K with gaps -> 0.. without. Raises Refused."""
    if not isinstance(ranks, list) or len(ranks) != count:
        raise Refused("bad_ranks")
    if any(type(rank) is not int or not 1 <= rank <= count for rank in ranks):
        raise Refused("bad_ranks")
    order = sorted(set(ranks))
    return tuple(order.index(rank) for rank in ranks)
