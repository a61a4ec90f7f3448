"""``checkpoint``: limiting how many are kept."""
