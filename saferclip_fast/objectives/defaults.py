"""The default options of SafeR-CLIP here; without torch, so that the command line reads them at once."""

# Chosen by measurement on synthetic scenes and photographs: docs/method.md, "Weights".
DEFAULT_WEIGHTS = {
    "uni_text": 4.0,
    "uni_image": 1.0,
    "cross_text": 4.0,
    "cross_image": 4.0,
    "cos_text": 16.0,
    "cos_image": 16.0,
    "nce_text": 1.0,
    "nce_image": 1.0,
    "rank_guard": 64.0,
    "spread": 0.0,
    "neighbors": 0.0,
}
DEFAULT_K, DEFAULT_BETA, DEFAULT_MARGIN = 16, 10.0, 0.3
DEFAULT_PAGE, DEFAULT_GUARD_K, DEFAULT_GUARD_MARGIN = 0.03, 16, 0.0
