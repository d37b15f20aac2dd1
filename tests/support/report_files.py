"""Parts of the JSON files that the report reads, as they are written."""

from saferclip_fast.results import GATE_CURVE_FORMAT, GUARD_FORMAT, RESTORE_FORMAT, UNSAFE_RATE, at


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


def guard_of(source="scenes:n=40"):
    """Parts of guard.json, as the guard writes them."""
    roc = [(0.9, 0.5, 0.0), (0.5, 0.9, 0.1), (0.0, 1.0, 1.0)]
    entry = {
        "safe": 40,
        "unsafe": 40,
        "auroc": {"value": 0.95, "low": 0.9, "high": 0.98},
        "ece": 0.031,
        "roc": [{"threshold": t, "found": f, "false_alarms": a} for t, f, a in roc],
        "reliability": [{"predicted": p, "observed": p, "samples": 40} for p in (0.1, 0.9)],
    }
    test = {"source": source, "rows": 40}
    return {"format": GUARD_FORMAT, "data": {"test": test}, "modalities": {"text": entry, "image": entry}}


def gate_of(label="zero-shot"):
    """Parts of gate-curve.json, as the gate writes them."""
    points = [
        {
            "thresholds": {"text": threshold, "image": threshold},
            "chosen": chosen,
            "kept": {"text": threshold, "image": 1.0},
            "sent": {},
            "metrics": {
                name: {"label": label, "value": value, "low": 0.0, "high": 1.0} for name, value in values.items()
            },
        }
        for chosen, threshold in ((True, 0.3), (False, 0.0), (False, 0.5), (False, 1.0))
        for values in [{at(UNSAFE_RATE): 0.2 + threshold / 2, "zero_shot": 0.75}]
    ]
    return {"format": GATE_CURVE_FORMAT, "safety": at(UNSAFE_RATE), "utility": "zero_shot", "points": points}


def restored_of(name="visual.proj"):
    """restore.json, as the restoration writes it."""
    figures = {
        model: {at(UNSAFE_RATE): rate, "zero_shot.own": accuracy}
        for model, rate, accuracy in (("safe", 0.1, 0.4), ("later", 0.6, 0.7), ("restored", 0.2, 0.65))
    }
    layers = [{"name": name, "rho": rho, "changed": rho < 0.35} for rho in (0.9, 0.1, 0.3)]
    return {"format": RESTORE_FORMAT, "add": 0.5, "threshold": 0.35, "figures": figures, "layers": layers}
