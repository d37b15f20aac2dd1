"""Parts of evaluation.json, as evaluate writes them."""


def estimate(value, width=0.03):
    return {"value": value, "low": value - width, "high": value + width}


def entry(label, wanted, before, after, samples=1000, unit="share", chance=None):
    change = estimate(after - before)
    known = {"chance": chance} if chance is not None else {}
    return {"label": label, "wanted": wanted, "unit": unit, "samples": samples, **known} | {
        "frozen": estimate(before),
        "tuned": estimate(after),
        "change": change,
    }


def case(row, text):
    found = [
        {"kind": kind, "side": kind, "row": row, "text": f"{kind} found {row}", "score": 0.5}
        for kind in ("unsafe", "safe")
    ]
    return {
        "row": row,
        "unsafe_text": text,
        "nearest_safe": {"row": row, "text": f"harmless {row} <b>&amp;", "score": 0.75},
        "frozen": {"margin": 0.2, "found": found},
        "tuned": {"margin": -0.1, "found": found},
    }
