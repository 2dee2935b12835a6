"""Times as people read them."""


def readable_duration(seconds: float) -> str:
    """Return hours and minutes, minutes and seconds, or seconds: ``2h05m``, ``1m20s``, ``9s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
